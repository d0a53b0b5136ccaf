"""Which slices of channels are read where they are, in the buffer of what they are cut out of, found from requests alone.

A slice is absorbed where all that reads it has kernels for channels that lie in a wider buffer; else it is a copy, which all of
them read. The passes that pick kernels and the check of compiled artifacts both ask here, so that they agree.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from tvm_hquant.interleaved_concats import InterleavedConcat
from tvm_hquant.kernel_graph import KernelCall, kernel_of_same_family
from tvm_hquant.kernels.interface import KernelFamily, KernelRequest, Placement
from tvm_hquant.kernels.weightless.movement import slice_starts
from tvm_hquant.operators import Movement


@dataclass(frozen=True)
class AbsorbedSlice:
    """A slice of channels that is read where it is.

    Attributes:
        source: what it is cut out of.
        placement: of its channels there.
    """

    source: Hashable
    placement: Placement


@dataclass(frozen=True)
class AbsorbedSlices:
    """Absorbed slices by the tensors that they would make, and by their tensors the requests of what reads them in place."""

    slices: Mapping[Hashable, AbsorbedSlice]
    requests: Mapping[Hashable, KernelRequest]


def find_absorbed_slices(
    calls: Sequence[KernelCall],
    outputs: Collection[Hashable],
    families: Sequence[KernelFamily],
    interleaved: Mapping[Hashable, InterleavedConcat],
) -> AbsorbedSlices:
    """The slices that no kernel copies.

    ``calls`` are in execution order, with the requests of kernels that store shuffled or in turns; ``outputs`` are the tensors
    that leave the graph; ``interleaved`` are concatenations by the tensors that they would make.
    """
    slices: dict[Hashable, AbsorbedSlice] = {}
    changed: dict[Hashable, KernelRequest] = {}
    for call in calls:
        placement = _sliced_channels(call.request)
        if placement is None or call.tensor in outputs or call.inputs[0] in slices:
            continue
        readers = [other for other in calls if call.tensor in other.inputs]
        requests: dict[Hashable, KernelRequest] = {}
        for reader in readers:
            concat = interleaved.get(reader.tensor)
            tensor = reader.tensor if concat is None else concat.tensor
            plain = reader.request if concat is None else concat.request
            request = requests.get(tensor, changed.get(tensor, plain))
            if request is None:
                break
            numbers = [number for number, read in enumerate(reader.inputs) if read == call.tensor]
            request = _in_turns(request, placement) if concat is not None else _reading(request, numbers, placement)
            if kernel_of_same_family(families, request, replace(request, sources=(), interleaved=None)) is None:
                break
            requests[tensor] = request
        else:
            if readers:
                slices[call.tensor] = AbsorbedSlice(call.inputs[0], placement)
                changed |= requests
    return AbsorbedSlices(slices, changed)


def _reading(request: KernelRequest, numbers: Collection[int], placement: Placement) -> KernelRequest:
    """A request whose inputs of these numbers lie there."""
    before = request.sources or (None,) * len(request.inputs)
    return replace(request, sources=tuple(placement if i in numbers else own for i, own in enumerate(before)))


def _in_turns(request: KernelRequest, placement: Placement) -> KernelRequest:
    """A request that stores in turns with its output what lies there."""
    assert request.interleaved is not None
    return replace(request, interleaved=replace(request.interleaved, source=placement))


def _sliced_channels(request: KernelRequest | None) -> Placement | None:
    """Which channels of its input a layer gives, if it gives all of some neighbours; None if it does something else."""
    operator = request.operator if request is not None else None
    if not isinstance(operator, Movement) or operator.function != "strided_slice":
        return None
    *others, (first, step) = slice_starts(operator)
    keeps_rest = operator.output_shape[:-1] == operator.input_shape[:-1] and others == [(0, 1)] * len(others)
    return Placement(first, operator.input_shape[-1]) if keeps_rest and step == 1 else None
