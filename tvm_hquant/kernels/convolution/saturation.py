"""What the codes of a layer's weights prove about sums in 16 bits.

``vpmaddubsw`` multiplies unsigned activation bytes by signed weight bytes and adds neighbouring products in int16, with
saturation. Where the weights prove that no sum of a chain can leave int16, a kernel may add that many such pair sums
before it widens them; the result is the same as with 32-bit sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.convolution.patches import is_patch, weights_of_patches

LONGEST_CHAIN = 32
"""Pair sums of a chain, at most."""
_MOST_CENTRED = 8
_OCTET = 8
"""int16 lanes of a register of NEON: every eighth channel meets in a lane."""
_INT16 = np.iinfo(np.int16)


def saturation_free_pairs(weight_codes: npt.NDArray[Any]) -> int:
    """How many chained pair sums of u8·s8 products surely fit int16, for every output channel: mostly 0, 1, 2, 4, 8, 16 or 32.

    Args:
        weight_codes: int8 [points, out_channels, in_channels / groups, kernel_h, kernel_w].

    A chain of n takes, at one kernel position, products of the channels (4k, 4k + 1) or (4k + 2, 4k + 3) of n consecutive
    quads k that start at a multiple of n. Missing channels at the end count as zero weights.

    A window of few channels (:func:`.patches.is_patch`) has its products taken as one patch, rows, then
    columns, then channels: chains go by the order in it, and single pairs by that of the channels, too.

    Where groups have one input channel, as in depthwise layers, pairs are made of kernel rows instead, j and j + 2, and a
    chain takes all columns of the window: the answer is 0, 1, or the window's width.
    """
    in_channels, height, width = weight_codes.shape[2:]
    if in_channels == 1:
        rows = weight_codes[:, :, 0].astype(np.int32)
        rows = np.pad(rows, ((0, 0), (0, 0), (0, 2), (0, 0)))
        pairs = np.stack([rows[:, :, :-2], rows[:, :, 2:]], axis=-1)
        # [points, channels, first row of the pair, column and member of the pair]
        return width if _fits(pairs.reshape(*pairs.shape[:3], -1)) else int(_fits(pairs))
    if is_patch(in_channels, height, width):
        return saturation_free_pairs(weights_of_patches(weight_codes)) if _longest_chain(weight_codes) else 0
    return _longest_chain(weight_codes)


def _longest_chain(weight_codes: npt.NDArray[Any]) -> int:
    points, out_channels, in_channels, height, width = weight_codes.shape
    rows = np.moveaxis(weight_codes, 2, -1).reshape(-1, in_channels).astype(np.int32)
    rows = np.pad(rows, ((0, 0), (0, -in_channels % (4 * LONGEST_CHAIN))))
    longest = 0
    for chain in (1, 2, 4, 8, 16, LONGEST_CHAIN):
        # [kernel positions of every channel, chains, quad of the chain, pair within the quad, member of the pair]
        quads = rows.reshape(points * out_channels * height * width, -1, chain, 2, 2)
        if not _fits(quads.swapaxes(2, 3).reshape(-1, 2 * chain)):
            break
        longest = chain
    return longest


def centred_products(weight_codes: npt.NDArray[Any]) -> int:
    """How many products of activation codes less 128 with weights surely fit int16 when added: 2, 4 or 8.

    Two always do, since weights are within −127…127. The products of a sum are, at one kernel position, those of every eighth
    channel of 8n, starting at a multiple of 8n. Missing channels at the end count as zero weights. A patch counts as one
    position. Where groups have one input channel, as in depthwise layers, the products are those of n columns of a kernel row
    instead, starting at a multiple of n.

    Args:
        weight_codes: int8 [points, out_channels, in_channels / groups, kernel_h, kernel_w].
    """
    if is_patch(*weight_codes.shape[2:]):
        # Of so few channels, a sum over one position has two products.
        weight_codes = weights_of_patches(weight_codes)
    in_channels = weight_codes.shape[2]
    if in_channels == 1:
        return _columns_together(weight_codes)
    rows = np.moveaxis(weight_codes, 2, -1).reshape(-1, in_channels).astype(np.int32)
    rows = np.pad(rows, ((0, 0), (0, -in_channels % (_OCTET * _MOST_CENTRED))))
    longest = 2
    for count in (4, _MOST_CENTRED):
        if not _fits(rows.reshape(len(rows), -1, count, _OCTET).swapaxes(2, 3).reshape(-1, count), (-128, 127)):
            break
        longest = count
    return longest


def _columns_together(weight_codes: npt.NDArray[Any]) -> int:
    width = weight_codes.shape[-1]
    rows = np.pad(weight_codes.reshape(-1, width).astype(np.int32), ((0, 0), (0, -width % _MOST_CENTRED)))
    fitting = [count for count in (4, _MOST_CENTRED) if _fits(rows.reshape(-1, count), (-128, 127))]
    return max(fitting, default=2)


def _fits(weights: npt.NDArray[np.int32], activations: tuple[int, int] = (0, 255)) -> bool:
    """Whether sums of activations times weights along the last axis stay within int16 whatever the activations are."""
    lowest_activation, highest_activation = activations
    positive, negative = np.maximum(weights, 0).sum(axis=-1), np.minimum(weights, 0).sum(axis=-1)
    highest = highest_activation * positive + lowest_activation * negative
    lowest = lowest_activation * positive + highest_activation * negative
    return bool(highest.max(initial=0) <= _INT16.max and lowest.min(initial=0) >= _INT16.min)
