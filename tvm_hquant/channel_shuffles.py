"""Which kernels store their output shuffled, so that a channel shuffle behind them moves nothing, found from requests alone.

The pass that picks kernels and the check of compiled artifacts both ask here, so that they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from tvm_hquant.kernel_graph import KernelCall, kernel_of_same_family
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest
from tvm_hquant.kernels.weightless.movement import interleaved_groups
from tvm_hquant.operators import Conv2D, Movement


@dataclass(frozen=True, eq=False)
class AbsorbedShuffle:
    """A channel shuffle whose input is stored shuffled.

    Attributes:
        tensor: the input.
        kernel: the kernel of the layer that makes it.
    """

    tensor: Hashable
    kernel: Kernel


def find_absorbed_shuffles(
    calls: Sequence[KernelCall], outputs: Sequence[Hashable], families: Sequence[KernelFamily]
) -> Mapping[Hashable, AbsorbedShuffle]:
    """For each shuffle of the channels of a convolution that nothing else reads, how that is stored.

    ``calls`` are in execution order; ``outputs`` are the tensors that leave the graph. Shuffles after convolutions whose
    kernels cannot store them shuffled are left out.
    """
    makers = {call.tensor: call for call in calls}
    readers = Counter(tensor for call in calls for tensor in call.inputs) + Counter(outputs)
    found: dict[Hashable, AbsorbedShuffle] = {}
    for call in calls:
        groups = shuffled_groups(call.request)
        if not groups:
            continue
        (tensor,) = call.inputs
        request = makers[tensor].request if tensor in makers else None
        if request is None or readers[tensor] != 1 or not isinstance(request.operator, Conv2D):
            continue
        kernel = kernel_of_same_family(families, replace(request, shuffled=groups), request)
        if kernel is not None:
            found[call.tensor] = AbsorbedShuffle(tensor, kernel)
    return found


def shuffled_groups(request: KernelRequest | None) -> int:
    """The groups whose channels a layer puts in turn; 0 if it does something else."""
    operator = request.operator if request is not None else None
    if not isinstance(operator, Movement) or operator.function != "take":
        return 0
    axis, *indices = operator.parameters
    is_whole = axis == len(operator.input_shape) - 1 and len(indices) == operator.input_shape[-1]
    return interleaved_groups(indices) if is_whole else 0
