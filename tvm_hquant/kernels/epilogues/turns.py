"""Outputs stored in turns with another tensor: what a shuffle of two concatenated tensors makes, without a copy of either."""

from __future__ import annotations

from dataclasses import dataclass

from tvm_hquant.kernels.convolution.group_interleaving import interleaved
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression


@dataclass(frozen=True)
class Turns:
    """Puts channels of the output and of another tensor in turns, vector by vector.

    Attributes:
        other: the other tensor, flat.
        position: of an output's channel in each pair (:class:`tvm_hquant.kernels.interface.Interleaving`).
    """

    other: Buffer
    position: int

    def pairs(self, own: Expression, other: Expression) -> Expression:
        """Twice as many lanes: those of a vector of outputs and of the other tensor's vector of the same channels."""
        return interleaved([own, other] if self.position == 0 else [other, own])
