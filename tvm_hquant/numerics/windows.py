"""Sliding windows over channels-last arrays, as views: one position of the kernel at a time, or all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.operators import Conv2D, Window

Array = npt.NDArray[Any]


def pad_spatial(x: Array, window: Window, fill: float) -> Array:
    """``x`` [n, h, w, c] with the window's padding filled with ``fill``."""
    top, left, bottom, right = window.padding
    if not any(window.padding):
        return x
    n, h, w, c = x.shape
    padded = np.full((n, h + top + bottom, w + left + right, c), fill, x.dtype)
    padded[:, top : top + h, left : left + w] = x
    return padded


def positions(padded: Array, window: Window, output_size: tuple[int, int]) -> Iterator[Array]:
    """For every kernel position, (kh, kw) ascending: the view [n, out_h, out_w, c] of what lies under it."""
    (kernel_h, kernel_w), (stride_h, stride_w) = window.kernel, window.strides
    dilation_h, dilation_w = window.dilation
    out_h, out_w = output_size
    for y in range(0, kernel_h * dilation_h, dilation_h):
        for x in range(0, kernel_w * dilation_w, dilation_w):
            yield padded[
                :, y : y + (out_h - 1) * stride_h + 1 : stride_h, x : x + (out_w - 1) * stride_w + 1 : stride_w
            ]


def columns(padded: Array, operator: Conv2D) -> Array:
    """[n · out_h · out_w, kh · kw, groups, in_channels / groups]: what each output is a sum over."""
    _, out_h, out_w, _ = operator.output_shape
    parts = list(positions(padded, operator.window, (out_h, out_w)))
    stacked = parts[0][:, :, :, None] if len(parts) == 1 else np.stack(parts, axis=3)
    return stacked.reshape(-1, len(parts), operator.groups, operator.in_channels // operator.groups)


def grouped_weights(weights: Array, operator: Conv2D) -> Array:
    """``weights`` [out, in / groups, kh, kw] as [kh · kw, groups, in / groups, out / groups]."""
    out, per_group, kernel_h, kernel_w = operator.weight_shape
    grouped = weights.reshape(operator.groups, out // operator.groups, per_group, kernel_h * kernel_w)
    return grouped.transpose(3, 0, 2, 1)
