"""Which kernels write straight into the buffer of a concatenation, found from requests alone.

The pass that rewrites modules and the check of compiled artifacts both ask here, so that they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from tvm_hquant.kernel_graph import KernelCall, first_kernel, kernel_of_same_family
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest, Placement
from tvm_hquant.operators import Concat


def part_name(concat: str, number: int) -> str:
    """Name of the layer that copies an input of a concatenation into its buffer."""
    return f"{concat}.part{number}"


@dataclass(frozen=True, eq=False)
class ConcatPart:
    """One input of a concatenation and the kernel that brings it into the whole buffer.

    Attributes:
        tensor: the input, or what it is a slice of that is read where it is.
        kernel: the kernel of the layer that makes it, writing in place; or, if ``is_copy``, one that copies it.
        is_copy: whether the tensor exists by itself, because others read it or its kernel cannot write in place.
        makes_buffer: whether its kernel is the first to run: its output is the buffer, which the others get.
    """

    tensor: Hashable
    kernel: Kernel
    is_copy: bool
    makes_buffer: bool = False


def find_concat_parts(
    calls: Sequence[KernelCall], outputs: Sequence[Hashable], families: Sequence[KernelFamily]
) -> Mapping[Hashable, tuple[ConcatPart, ...]]:
    """For each concatenation of channels that some of its inputs are written into in place, all its parts in order.

    ``calls`` are in execution order; ``outputs`` are the tensors that leave the graph.
    """
    makers = {call.tensor: call for call in calls}
    readers = Counter(tensor for call in calls for tensor in call.inputs) + Counter(outputs)
    found: dict[Hashable, tuple[ConcatPart, ...]] = {}
    for call in calls:
        request = call.request
        if request is None or not isinstance(request.operator, Concat):
            continue
        operator = request.operator
        channels = operator.output_shape[-1]
        if operator.axis != len(operator.output_shape) - 1:
            continue
        parts: list[ConcatPart | None] = []
        offset = 0
        sources = request.sources or (None,) * len(call.inputs)
        for tensor, shape, source in zip(call.inputs, operator.input_shapes, sources, strict=True):
            placement = Placement(offset, channels)
            offset += shape[-1]
            # A concatenation whose inputs are written in place has no kernel that could write elsewhere.
            maker = None if tensor in found else makers.get(tensor)
            kernel = None
            if source is None and readers[tensor] == 1 and maker is not None and maker.request is not None:
                kernel = kernel_of_same_family(families, replace(maker.request, placement=placement), maker.request)
            if kernel is not None:
                parts.append(ConcatPart(tensor, kernel, is_copy=False))
                continue
            part = Concat((shape,), operator.axis)
            plain = KernelRequest(part, (request.output,), request.output, placement=placement)
            copy = first_kernel(families, replace(plain, sources=(source,)) if source is not None else plain)
            parts.append(ConcatPart(tensor, copy, is_copy=True) if copy is not None else None)
        if all(parts) and any(not part.is_copy for part in parts if part is not None):
            found[call.tensor] = _with_first(tuple(part for part in parts if part is not None), calls)
    return found


def _with_first(parts: tuple[ConcatPart, ...], calls: Sequence[KernelCall]) -> tuple[ConcatPart, ...]:
    written = {part.tensor for part in parts if not part.is_copy}
    first = next(call.tensor for call in calls if call.tensor in written)
    return tuple(replace(part, makes_buffer=part.tensor == first) for part in parts)
