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

    def axes() -> tuple[Any, Any]:
        return te.reduce_axis((0, kernel_h), "kh"), te.reduce_axis((0, kernel_w), "kw")

    i, j = axes()

    def is_largest(n: Any, h: Any, w: Any, c: Any) -> Any:
        row, column = h * stride_h - top + i * dilation_h, w * stride_w - left + j * dilation_w
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        found = tirx.if_then_else(inside, tirx.Select(x[n, row, column, c] == y[n, h, w, c], 1.0, 0.0), 0.0)
        return te.sum(found.astype("float32"), axis=(i, j))

    count = te.compute(y.shape, is_largest, name="largest")
    share = te.compute(y.shape, lambda *p: g(*p) / tirx.max(count(*p), tirx.const(1.0, "float32")), name="share")
    k, m = axes()

    def received(n: Any, h: Any, w: Any, c: Any) -> Any:
        row, column = h + top - k * dilation_h, w + left - m * dilation_w
        out_row, out_column = tirx.floordiv(row, stride_h), tirx.floordiv(column, stride_w)
        is_window = tirx.all(
            row >= 0,
            column >= 0,
            tirx.floormod(row, stride_h) == 0,
            tirx.floormod(column, stride_w) == 0,
            out_row < out_height,
            out_column < out_width,
        )
        given = tirx.if_then_else(
            is_window,
            tirx.Select(
                x[n, h, w, c] == y[n, out_row, out_column, c],
                share[n, out_row, out_column, c],
                tirx.const(0.0, "float32"),
            ),
            tirx.const(0.0, "float32"),
        )
        return te.sum(given, axis=(k, m))

    return te.compute(x.shape, received, name="gradient")
