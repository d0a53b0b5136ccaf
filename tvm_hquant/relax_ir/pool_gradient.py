"""The gradient of a max pool as a TIR function."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from tvm_hquant.operators import Window


def max_pool2d_gradient(builder: Any, gradient: Any, data: Any, output: Any, window: Window) -> Any:
    """A Relax call that gives ∂loss/∂data of ``output = max_pool2d(data)``, all channels-last.

    Each element of ``gradient`` goes to the largest elements of its window, shared equally among equal ones.
    """

    def compute(g: Any, x: Any, y: Any) -> Any:
        return _compute(g, x, y, window)

    return builder.call_te(compute, gradient, data, output, primfunc_name_hint="max_pool2d_gradient")


def _compute(g: Any, x: Any, y: Any, window: Window) -> Any:
    (kernel_h, kernel_w), (stride_h, stride_w) = window.kernel, window.strides
    (top, left, _, _), (dilation_h, dilation_w) = window.padding, window.dilation
    (_, height, width, _), (_, out_height, out_width, _) = x.shape, y.shape
    zero, one = tirx.const(0.0, "float32"), tirx.const(1.0, "float32")
    # Sums are written out, so that the innermost loop is the one over channels, in vectors.
    positions = [(i * dilation_h, j * dilation_w) for i in range(kernel_h) for j in range(kernel_w)]

    def count(n: Any, h: Any, w: Any, c: Any) -> Any:
        total = zero
        for i, j in positions:
            row, column = h * stride_h - top + i, w * stride_w - left + j
            inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
            equal = tirx.Select(x[n, row, column, c] == y[n, h, w, c], one, zero)
            total += tirx.if_then_else(inside, equal, zero)
        return total

    largest = te.compute(y.shape, count, name="largest")
    share = te.compute(y.shape, lambda *p: g(*p) / tirx.max(largest(*p), one), name="share")

    def received(n: Any, h: Any, w: Any, c: Any) -> Any:
        total = zero
        for i, j in positions:
            row, column = h + top - i, w + left - j
            out_row, out_column = tirx.floordiv(row, stride_h), tirx.floordiv(column, stride_w)
            is_window = tirx.all(
                row >= 0,
                column >= 0,
                tirx.floormod(row, stride_h) == 0,
                tirx.floormod(column, stride_w) == 0,
                out_row < out_height,
                out_column < out_width,
            )
            is_largest = x[n, h, w, c] == y[n, out_row, out_column, c]
            given = tirx.Select(is_largest, share[n, out_row, out_column, c], zero)
            total += tirx.if_then_else(is_window, given, zero)
        return total

    return te.compute(x.shape, received, name="gradient")
