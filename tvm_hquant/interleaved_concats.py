"""Which kernels do a concatenation of two tensors and the channel shuffle behind it, found from requests alone.

A shuffle of two concatenated tensors into two groups puts their channels in turns. A convolution that makes one of them stores
them so: its epilogue reads the other one's channels, and writes both. The passes that pick kernels and the check of compiled
artifacts both ask here, so that they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from tvm_hquant.channel_shuffles import shuffled_groups
from tvm_hquant.kernel_graph import KernelCall, kernel_of_same_family
from tvm_hquant.kernels.interface import Interleaving, KernelFamily, KernelRequest
from tvm_hquant.operators import Concat, Conv2D

_TENSORS = 2


@dataclass(frozen=True)
class InterleavedConcat:
    """A concatenation and a shuffle behind it that move nothing.

    Attributes:
        shuffle: the tensor of the shuffle, which is the buffer that the kernel writes.
        tensor: the input of the concatenation whose kernel writes both in turns.
        other: the other input.
        request: of that kernel.
    """

    shuffle: Hashable
    tensor: Hashable
    other: Hashable
    request: KernelRequest


def find_interleaved_concats(
    calls: Sequence[KernelCall], outputs: Sequence[Hashable], families: Sequence[KernelFamily]
) -> Mapping[Hashable, InterleavedConcat]:
    """Such concatenations, by their tensors.

    ``calls`` are in execution order; ``outputs`` are the tensors that leave the graph.
    """
    makers = {call.tensor: call for call in calls}
    order = {call.tensor: index for index, call in enumerate(calls)}
    readers = Counter(tensor for call in calls for tensor in call.inputs) + Counter(outputs)
    found: dict[Hashable, InterleavedConcat] = {}
    for call in calls:
        if shuffled_groups(call.request) != _TENSORS:
            continue
        concat = makers.get(call.inputs[0])
        if concat is None or readers[concat.tensor] != 1 or not _joins_halves(concat.request):
            continue
        # What is made last finds the other one there.
        first, last = sorted(concat.inputs, key=lambda tensor: order.get(tensor, -1))
        request = makers[last].request if last in makers else None
        if request is None or readers[last] != 1 or not isinstance(request.operator, Conv2D):
            continue
        in_turns = replace(request, interleaved=Interleaving(concat.inputs.index(last)))
        if kernel_of_same_family(families, in_turns, request) is not None:
            found[concat.tensor] = InterleavedConcat(call.tensor, last, first, in_turns)
    return found


def _joins_halves(request: KernelRequest | None) -> bool:
    """Whether a layer concatenates the channels of two tensors that have as many."""
    operator = request.operator if request is not None else None
    if not isinstance(operator, Concat) or len(operator.input_shapes) != _TENSORS:
        return False
    return operator.axis == len(operator.output_shape) - 1 and len({*operator.input_shapes}) == 1
