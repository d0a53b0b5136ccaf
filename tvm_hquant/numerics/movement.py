"""Movements of values, of any dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import KernelError
from tvm_hquant.operators import Movement

Array = npt.NDArray[Any]


def move(operator: Movement, x: Array, fill: Any) -> Array:
    """``x`` moved; ``fill`` is what a pad puts in, a value of its dtype."""
    p = operator.parameters
    match operator.function:
        case "reshape":
            return x.reshape(operator.output_shape)
        case "permute_dims":
            return x.transpose(p)
        case "take":
            return np.take(x, p[1:], axis=p[0])
        case "strided_slice":
            slices = [slice(None)] * x.ndim
            for axis, begin, stride in zip(p[::3], p[1::3], p[2::3], strict=True):
                last = begin + (operator.output_shape[axis] - 1) * stride
                slices[axis] = slice(begin, last + 1, stride)
            return x[tuple(slices)]
        case "depth_to_space":
            groups, rows, columns, top, left = p
            batch, height, width, channels = operator.output_shape
            blocks = x.reshape(*x.shape[:3], groups, rows, columns, channels // groups)
            pixels = blocks.transpose(0, 1, 4, 2, 5, 3, 6).reshape(batch, x.shape[1] * rows, -1, channels)
            return pixels[:, top : top + height, left : left + width]
        case "pad":
            return np.pad(x, list(zip(p[::2], p[1::2], strict=True)), constant_values=fill)
    raise unknown_movement(operator.function)


def unknown_movement(name: str) -> KernelError:
    """The error for a movement that nothing knows."""
    return KernelError(f"no movement {name!r}: use reshape, permute_dims, strided_slice, take, depth_to_space or pad")
