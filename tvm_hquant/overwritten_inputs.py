"""Which kernels write their output over one of their inputs, found from requests alone.

A layer may do so with a tensor that nobody reads any more: where all other layers that read it, or a view of it, come before,
because the layer depends on them. So it does not matter in which order layers run otherwise. Graph inputs belong to the caller,
outputs have memory of their own, and operators that TVM computes may hold on to what they get.

The pass that picks kernels and the check of compiled artifacts both ask here, so that they agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from tvm_hquant.kernel_graph import KernelCall, kernel_of_same_family
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.operators import Add, Concat, Conv2D, Convert, Dense, Unary
from tvm_hquant.relax_ir.kernel_calls import is_view
from tvm_hquant.tensor_format import STORAGE_DTYPE


def find_overwritten_inputs(
    calls: Sequence[KernelCall],
    outputs: Sequence[Hashable],
    families: Sequence[KernelFamily],
    names: Mapping[Hashable, Hashable],
) -> Mapping[Hashable, Kernel]:
    """The kernels of layers that write over an input, by the tensors that they make.

    ``calls`` are in execution order, with the requests of kernels that store shuffled or in turns, or read slices in place;
    ``outputs`` are the tensors that leave the graph. ``names`` are the tensors that no kernel makes, each with the one in whose
    memory it is. What a concatenation reads is left to :mod:`tvm_hquant.concat_parts`.
    """
    views = {call.tensor: call.inputs[0] for call in calls if call.request is not None and is_view(call.request)}
    memory = _Memory(calls, outputs, {**views, **names})
    settled = {*views, *names}
    settled |= {call.tensor for call in calls if call.request is not None and _stores_shuffled(call.request)}
    settled |= {tensor for call in calls if _is_concat(call) for tensor in call.inputs}
    kernels: dict[KernelRequest, Kernel | None] = {}
    found: dict[Hashable, Kernel] = {}
    for index, call in enumerate(calls):
        if call.request is None or call.tensor in settled:
            continue
        for number in _fitting_inputs(call.request):
            request = replace(call.request, overwritten=number)
            if not memory.is_free(index, number):
                continue
            if request not in kernels:
                kernels[request] = kernel_of_same_family(families, request, call.request)
            kernel = kernels[request]
            if kernel is not None:
                found[call.tensor] = kernel
                break
    return found


def _stores_shuffled(request: KernelRequest) -> bool:
    return request.shuffled > 0 or request.interleaved is not None


def _is_concat(call: KernelCall) -> bool:
    return call.request is not None and isinstance(call.request.operator, Concat)


def _fitting_inputs(request: KernelRequest) -> list[int]:
    """The inputs, of layers that read each element just for the one at the same place, that are stored as the output is."""
    first = {Conv2D: 1, Dense: 1, Add: 0, Unary: 0, Convert: 0}.get(type(request.operator))
    if first is None:
        return []
    output = request.operator.output_shape, STORAGE_DTYPE[request.output]
    stored = zip(input_shapes(request.operator), (STORAGE_DTYPE[s] for s in request.inputs), strict=True)
    in_place = [number for number, source in enumerate(request.sources) if source is not None]
    return [number for number, own in enumerate(stored) if number >= first and own == output and number not in in_place]


class _Memory:
    """Which calls use the memory of which tensors, and which calls depend on which."""

    def __init__(
        self, calls: Sequence[KernelCall], outputs: Sequence[Hashable], names: Mapping[Hashable, Hashable]
    ) -> None:
        makers = {call.tensor: index for index, call in enumerate(calls)}
        self._owner: dict[Hashable, Hashable] = {}
        self._readers: dict[Hashable, set[int]] = defaultdict(set)
        self._taken: set[Hashable] = set()
        self._before: list[int] = []
        """For every call a bit for each call that it depends on."""
        self._calls = calls
        for index, call in enumerate(calls):
            before = 0
            for tensor in call.inputs:
                maker = makers.get(tensor)
                if maker is None:
                    self._taken.add(tensor)
                else:
                    before |= 1 << maker | self._before[maker]
                self._readers[self._owner_of(tensor)].add(index)
            self._before.append(before)
            self._owner[call.tensor] = self._owner_of(names.get(call.tensor, call.tensor))
            if call.request is None:
                self._taken |= {call.tensor, *map(self._owner_of, call.inputs)}
        self._taken |= set(map(self._owner_of, outputs))

    def _owner_of(self, tensor: Hashable) -> Hashable:
        return self._owner.get(tensor, tensor)

    def is_free(self, index: int, number: int) -> bool:
        """Whether nothing needs the memory of an input of a call from then on."""
        owners = [self._owner_of(tensor) for tensor in self._calls[index].inputs]
        owner = owners[number]
        others = self._readers[owner] - {index}
        return (
            owner not in self._taken
            and owners.count(owner) == 1
            and all(self._before[index] >> other & 1 for other in others)
        )
