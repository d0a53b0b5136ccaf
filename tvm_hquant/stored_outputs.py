"""How the library of a graph stores outputs: shuffled where a channel shuffle follows, in the buffer of a concatenation, over
an input that nobody reads any more."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_hquant.channel_shuffles import AbsorbedShuffle, find_absorbed_shuffles
from tvm_hquant.concat_parts import ConcatPart, find_concat_parts
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import Array, Kernel, KernelFamily, KernelRequest
from tvm_hquant.overwritten_inputs import find_overwritten_inputs


@dataclass(frozen=True, eq=False)
class StoredOutputs:
    """What the passes that place outputs decide for a graph.

    ``concats`` holds the parts of concatenations that are written in place, ``shuffles`` channel shuffles that move nothing,
    ``overwriting`` the kernels that write over an input.
    """

    concats: Mapping[Hashable, Sequence[ConcatPart]]
    shuffles: Mapping[Hashable, AbsorbedShuffle]
    overwriting: Mapping[Hashable, Kernel]

    @property
    def parts(self) -> Mapping[Hashable, ConcatPart]:
        """The tensors that are written into the buffer of a concatenation."""
        return {part.tensor: part for parts in self.concats.values() for part in parts if not part.is_copy}

    @property
    def kernels(self) -> Mapping[Hashable, Kernel]:
        """The kernels of layers whose outputs are stored in another way than by themselves and in order."""
        shuffled = {shuffle.tensor: shuffle.kernel for shuffle in self.shuffles.values()}
        return {**shuffled, **{tensor: part.kernel for tensor, part in self.parts.items()}, **self.overwriting}


def find_stored_outputs(
    calls: Sequence[KernelCall], outputs: Sequence[Hashable], families: Sequence[KernelFamily]
) -> StoredOutputs:
    """The decisions for calls in execution order; ``outputs`` are the tensors that leave the graph."""
    shuffles = find_absorbed_shuffles(calls, outputs, families)
    overwriting = find_overwritten_inputs(calls, outputs, families, shuffles)
    return StoredOutputs(find_concat_parts(calls, outputs, families), shuffles, overwriting)


def in_channel_order(request: KernelRequest, stored: Array) -> Array:
    """The output of a layer, its channels in the operator's order, from the buffer that its kernel wrote into."""
    first, channels = request.output_offset, request.operator.output_shape[-1]
    output = stored[..., first : first + channels]
    if not request.shuffled:
        return output
    groups = request.shuffled
    apart = output.reshape(*output.shape[:-1], channels // groups, groups)
    return np.ascontiguousarray(apart.swapaxes(-1, -2)).reshape(output.shape)
