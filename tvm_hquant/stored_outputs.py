"""How the library of a graph stores outputs: shuffled where a channel shuffle follows, in turns with what they are concatenated
with, in the buffer of a concatenation, over an input that nobody reads any more. And which slices it reads where they are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tvm_hquant.channel_shuffles import AbsorbedShuffle, find_absorbed_shuffles
from tvm_hquant.channel_slices import AbsorbedSlice, find_absorbed_slices
from tvm_hquant.concat_parts import ConcatPart, find_concat_parts
from tvm_hquant.interleaved_concats import InterleavedConcat, find_interleaved_concats
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import Array, Kernel, KernelFamily, KernelRequest
from tvm_hquant.kernels.kernel_function import activation_types, input_place
from tvm_hquant.kernels.registry import select_kernel
from tvm_hquant.overwritten_inputs import find_overwritten_inputs


@dataclass(frozen=True, eq=False)
class StoredOutputs:
    """What the passes that place outputs decide for a graph.

    Attributes:
        shuffles: channel shuffles that move nothing, since their input is stored shuffled.
        interleaved: concatenations that move nothing, nor do the shuffles behind them, since a kernel does both.
        slices: slices that move nothing, since they are read where they are.
        kernels: of layers that are stored, or read, in another way than by themselves and in order.
        concats: the parts of concatenations that are written in place.
    """

    shuffles: Mapping[Hashable, AbsorbedShuffle]
    interleaved: Mapping[Hashable, InterleavedConcat]
    slices: Mapping[Hashable, AbsorbedSlice]
    kernels: Mapping[Hashable, Kernel]
    concats: Mapping[Hashable, Sequence[ConcatPart]]

    @property
    def parts(self) -> Mapping[Hashable, ConcatPart]:
        """The tensors that are written into the buffer of a concatenation."""
        return {part.tensor: part for parts in self.concats.values() for part in parts if not part.is_copy}

    @property
    def names(self) -> Mapping[Hashable, Hashable]:
        """The tensors that no kernel makes, each with the one in whose memory it is."""
        shuffled = {name: shuffle.tensor for name, shuffle in self.shuffles.items()}
        concats = {name: concat.tensor for name, concat in self.interleaved.items()}
        in_turns = {concat.shuffle: concat.tensor for concat in self.interleaved.values()}
        return {**shuffled, **concats, **in_turns, **{name: found.source for name, found in self.slices.items()}}

    def read(self, tensor: Hashable, inputs: Sequence[Hashable]) -> tuple[Hashable, ...]:
        """The tensors whose buffers the kernel of a layer gets, for those that the layer reads."""
        others = [concat.other for concat in self.interleaved.values() if concat.tensor == tensor]
        if tensor in self.interleaved:
            return (self.interleaved[tensor].tensor,)
        if tensor in self.slices:
            return tuple(inputs)
        return tuple(self.slices[t].source if t in self.slices else t for t in (*inputs, *others))


def find_stored_outputs(
    calls: Sequence[KernelCall], outputs: Sequence[Hashable], families: Sequence[KernelFamily]
) -> StoredOutputs:
    """The decisions for calls in execution order; ``outputs`` are the tensors that leave the graph."""
    shuffles = find_absorbed_shuffles(calls, outputs, families)
    interleaved = find_interleaved_concats(calls, outputs, families)
    requests = {shuffle.tensor: shuffle.kernel.request for shuffle in shuffles.values()}
    requests |= {concat.tensor: concat.request for concat in interleaved.values()}
    slices = find_absorbed_slices(_with_requests(calls, requests), outputs, families, interleaved)
    requests |= slices.requests
    kernels = {tensor: select_kernel(families, request) for tensor, request in requests.items()}
    stored = StoredOutputs(shuffles, interleaved, slices.slices, kernels, {})
    overwriting = find_overwritten_inputs(_with_requests(calls, requests), outputs, families, stored.names)
    stored = replace(stored, kernels={**kernels, **overwriting})
    chosen = {tensor: kernel.request for tensor, kernel in stored.kernels.items()}
    lowered = [
        KernelCall(
            call.tensor,
            None if call.tensor in stored.names else call.request,
            stored.read(call.tensor, call.inputs),
        )
        for call in _with_requests(calls, chosen)
    ]
    concats = find_concat_parts(lowered, outputs, families)
    stored = replace(stored, concats=concats)
    placed = {tensor: part.kernel for tensor, part in stored.parts.items()}
    return replace(stored, kernels={**stored.kernels, **placed})


def _with_requests(calls: Sequence[KernelCall], requests: Mapping[Hashable, KernelRequest]) -> list[KernelCall]:
    return [replace(call, request=requests.get(call.tensor, call.request)) for call in calls]


def in_channel_order(request: KernelRequest, stored: Array) -> Array:
    """The output of a layer, its channels in the operator's order, from the buffer that its kernel wrote into."""
    if request.interleaved is not None:
        return np.ascontiguousarray(stored[..., request.interleaved.position :: 2])
    first, channels = request.output_offset, request.operator.output_shape[-1]
    output = stored[..., first : first + channels]
    if not request.shuffled:
        return output
    groups = request.shuffled
    apart = output.reshape(*output.shape[:-1], channels // groups, groups)
    return np.ascontiguousarray(apart.swapaxes(-1, -2)).reshape(output.shape)


def in_wider_buffers(request: KernelRequest, inputs: Sequence[Array]) -> list[Array]:
    """What a kernel reads, from the inputs of its operator: what else lies in wider buffers, or is stored in turns, is zero."""
    if request.has_own_buffers:
        return list(inputs)
    buffers = [np.zeros(shape, dtype) for shape, dtype in activation_types(request)]
    for number, array in enumerate(inputs):
        first = input_place(request, number).offset
        buffers[number][..., first : first + array.shape[-1]] = array
    return buffers
