"""An independent, slow way to the same numbers: rational arithmetic and plain loops. Nothing here uses the product."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from tvm_hquant.operators import Conv2D, Epilogue, Window


def float32_array(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The values as float32, out-of-range ones as infinity."""
    return np.asarray(values, np.float32)


def bits(values: npt.ArrayLike) -> npt.NDArray[np.uint32]:
    """Bit patterns of float32 values: unlike ==, they tell +0 from −0."""
    return np.asarray(values, np.float32, order="C").view(np.uint32)


def float16_array(values: npt.ArrayLike) -> npt.NDArray[np.float16]:
    """The values as float16."""
    return np.asarray(values, np.float16)


def round_to_float32(value: Fraction) -> float:
    """The float32 nearest to a rational number, ties to even, denormals and overflow included."""
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / unit) * unit  # Python rounds a Fraction half to even
    if rounded >= Fraction(2) ** 128:
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def exact_fma(a: float, b: float, c: float) -> float:
    """float32 a·b + c, rounded once, of finite arguments; the sign of a zero is that of IEEE 754.

    A sum that is exactly 0 is −0 only if product and addend both are −0; one that underflows keeps its sign.
    """
    if (a == 0 or b == 0) and c == 0:
        product_negative = math.copysign(1, a) * math.copysign(1, b) < 0
        return -0.0 if product_negative and math.copysign(1, c) < 0 else 0.0
    return round_to_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))


def window_terms(operator: Conv2D, n: int, oh: int, ow: int, oc: int) -> Iterator[tuple[tuple[int, ...] | None, Any]]:
    """(index into the input or None for padding, index into the weights) of one output, in (kh, kw, ci) order."""
    _, height, width, _ = operator.input_shape
    (kernel_h, kernel_w), (stride_h, stride_w) = operator.window.kernel, operator.window.strides
    (top, left, _, _), (dilation_h, dilation_w) = operator.window.padding, operator.window.dilation
    per_group = operator.in_channels // operator.groups
    group = oc // (operator.out_channels // operator.groups)
    for kh in range(kernel_h):
        for kw in range(kernel_w):
            h, w = oh * stride_h - top + kh * dilation_h, ow * stride_w - left + kw * dilation_w
            inside = 0 <= h < height and 0 <= w < width
            for ci in range(per_group):
                yield (n, h, w, group * per_group + ci) if inside else None, (oc, ci, kh, kw)


@st.composite
def convolutions(draw: st.DrawFn, residual: bool = False) -> Conv2D:
    """Small convolutions of every kind: groups, depthwise, strides, dilation, asymmetric padding."""
    groups = draw(st.integers(1, 3))
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    window = Window(
        kernel=kernel,
        strides=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        padding=draw(st.tuples(*[st.integers(0, 2)] * 4)),
        dilation=dilation,
    )
    extent_h, extent_w = window.extent
    top, left, bottom, right = window.padding
    height = draw(st.integers(max(1, extent_h - top - bottom), 5))
    width = draw(st.integers(max(1, extent_w - left - right), 5))
    shape = (draw(st.integers(1, 2)), height, width, groups * draw(st.integers(1, 3)))
    bounds = draw(st.sampled_from([(-math.inf, math.inf), (0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)]))
    return Conv2D(shape, groups * draw(st.integers(1, 2)), window, groups, Epilogue(True, residual, *bounds))
