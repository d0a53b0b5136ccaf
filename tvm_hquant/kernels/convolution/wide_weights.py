"""Weights that are packed in bytes and multiplied in words: few of them are widened before the first tile, once for all tiles.

Steps that load bytes and widen them take up to 7 % longer where weights come from the nearest caches, and no longer where
they come from the farther ones. Constants of 16 bits instead would double what a network's weights take of memory.
"""

from __future__ import annotations

from math import prod

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.convolution.geometry import AnchorGeometry
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import convert
from tvm_hquant.kernels.vector_loops import load, store

_CACHE_SHARE = 2
"""Widened weights have a share of the second-level cache."""


def widens_weights(geometry: AnchorGeometry) -> bool:
    """Whether the weights of a convolution are widened beforehand: where its dot product can do so, and they are few."""
    wide = geometry.dot.with_wide_weights
    if wide is None:
        return False
    count = geometry.weight_elements * geometry.points
    fits = count * np.dtype(wide.weight_dtype).itemsize <= geometry.processor.l2_bytes // _CACHE_SHARE
    return fits and count <= prod(geometry.conv.output_shape)


def wide_weights(geometry: AnchorGeometry, weights: Buffer) -> Buffer:
    """The packed weights in a buffer of their own, as :attr:`DotProduct.with_wide_weights` reads them."""
    wide = geometry.dot.with_wide_weights
    assert wide is not None
    count, lanes = geometry.weight_elements * geometry.points, geometry.dot.lanes * geometry.dot.products
    widened = T.alloc_buffer((count,), wide.weight_dtype)
    with T.serial(count // lanes) as vector:
        codes = load(weights, vector * lanes, lanes)
        store(widened, vector * lanes, convert(codes, wide.weight_dtype), lanes)
    return widened
