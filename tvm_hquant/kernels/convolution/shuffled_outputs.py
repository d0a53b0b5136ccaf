"""Kernels of convolutions whose outputs all read the same channels: a shuffle of these outputs is an order of constants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.convolution.lane_order import channel_at_place
from tvm_hquant.kernels.interface import (
    Array,
    FloatAnchorConstants,
    IntegerAnchorConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
)
from tvm_hquant.operators import Conv2D


def is_order_of_constants(request: KernelRequest) -> bool:
    """Whether the outputs of a request are shuffled by :func:`with_shuffled_outputs`."""
    conv = request.operator
    is_plain = len(request.inputs) == 1 and request.placement is None and request.overwritten is None
    is_plain = is_plain and request.interleaved is None
    return request.shuffled > 0 and isinstance(conv, Conv2D) and conv.groups == 1 and is_plain


def with_shuffled_outputs(kernel: Kernel, request: KernelRequest) -> Kernel:
    """A kernel that stores its channels as ``request`` shuffles them, from the one that stores them in order."""
    channels = request.operator.output_shape[-1]
    order = channel_at_place(np.arange(channels), channels, request.shuffled)

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        match constants:
            case IntegerAnchorConstants(weight_codes=codes, multiplier=multiplier, offset=offset):
                ordered: LayerConstants = replace(
                    constants,
                    weight_codes=codes[:, order],
                    multiplier=multiplier[:, order],
                    offset=offset[order],
                )
            case FloatAnchorConstants(weights=weights, bias=bias):
                ordered = replace(constants, weights=weights[order], bias=bias[order])
            case _:
                raise KernelError(f"{kernel.name} takes the constants of a convolution, not {type(constants).__name__}")
        return kernel.pack(ordered)

    return replace(kernel, request=request, name=f"{kernel.name.removesuffix(']')} shuffled]", pack=pack)
