"""Float layers: float32 arithmetic in a fixed order; 16-bit storage is widened first and rounded once at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.float_polynomials import exp, power
from tvm_hquant.fused_multiply_add import FloatArray, fma, round_sum
from tvm_hquant.kernels.interface import FloatAnchorConstants, KernelRequest
from tvm_hquant.numerics.functions import clamp
from tvm_hquant.numerics.integer_layers import as_convolution
from tvm_hquant.numerics.storage import narrow, widen
from tvm_hquant.numerics.windows import columns, grouped_weights, pad_spatial, positions
from tvm_hquant.operators import (
    Anchor,
    AveragePool2D,
    Conv2D,
    Dense,
    LocalResponseNormalization,
    MaxPool2D,
    Softmax,
)

Array = npt.NDArray[Any]

_BLOCK = 1 << 14
"""Outputs that are computed at once: their accumulators and products stay in the second-level cache."""

_NO_TINY_SUMS = 2.0**-101
"""Products of factors that are 0 or so large together are multiples of 2⁻¹⁴⁹, and so is then every sum."""


def float_sums(operator: Conv2D, x: FloatArray, weights: FloatArray, start: FloatArray) -> FloatArray:
    """acc = start; for every (kh, kw, ci) ascending: acc = fma(x, w, acc); padding takes part as zeros.

    Args:
        operator: the convolution.
        x: float32 [n, h, w, in_channels].
        weights: float32 [out, in / groups, kh, kw].
        start: float32 [out], the bias or zeros.

    Returns:
        float32 [n · out_h · out_w, out_channels].
    """
    values = columns(pad_spatial(x, operator.window, 0.0), operator)
    rows, window_count, groups, per_group = values.shape
    by_channel = grouped_weights(weights, operator).transpose(0, 2, 1, 3)
    factors = np.ascontiguousarray(by_channel, np.float64).reshape(window_count * per_group, groups, -1)
    denormal_sums = not _smallest(x) * _smallest(weights) >= _NO_TINY_SUMS
    result: FloatArray = np.empty((rows, operator.out_channels), np.float32)
    block = max(1, _BLOCK // operator.out_channels)
    for first in range(0, rows, block):
        part = values[first : first + block].transpose(1, 3, 0, 2)
        steps = np.ascontiguousarray(part, np.float64).reshape(window_count * per_group, -1, groups, 1)
        result[first : first + block] = _accumulate(steps, factors, start, denormal_sums)
    return result


def _smallest(x: FloatArray) -> float:
    """The smallest magnitude but 0, in float64; infinite where there is none."""
    magnitudes = np.abs(x)
    return float(np.min(magnitudes, initial=np.inf, where=magnitudes > 0))


def _accumulate(steps: Array, factors: Array, start: FloatArray, denormal_sums: bool) -> FloatArray:
    """Steps [depth, rows, groups, 1] times factors [depth, groups, out / groups], one fma after the other."""
    shape = (steps.shape[1], *factors.shape[1:])
    total = np.broadcast_to(start.reshape(factors.shape[1:]), shape).astype(np.float64)
    rounded: FloatArray = total.astype(np.float32)
    if factors.shape[1] == 1:  # one group: two axes are faster than three
        steps, factors, shape = steps[:, :, 0], factors[:, 0], (shape[0], shape[2])
    elif factors.shape[2] == 1:
        steps, factors, shape = steps[:, :, :, 0], factors[:, :, 0], (shape[0], shape[1])
    total, rounded = total.reshape(shape), rounded.reshape(shape)
    product = np.empty(shape, np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for step, factor in zip(steps, factors, strict=True):
            np.multiply(step, factor, out=product)
            rounded = round_sum(product, total, denormal_sums)
            np.copyto(total, rounded)
    return rounded.reshape(shape[0], -1)


def float_anchor(request: KernelRequest, constants: FloatAnchorConstants, inputs: Sequence[Array]) -> Array:
    """A float convolution or dense layer: :func:`float_sums` from the bias, then :func:`float_epilogue`.

    Returns:
        The operator's output shape, rounded once to the output storage.
    """
    sums = float_sums(*widened_convolution(request, constants, inputs))
    return float_epilogue(request, constants, inputs, sums)


def widened_convolution(
    request: KernelRequest, constants: FloatAnchorConstants, inputs: Sequence[Array]
) -> tuple[Conv2D, FloatArray, FloatArray, FloatArray]:
    """The arguments of :func:`float_sums` for a request."""
    anchor: Anchor = request.operator  # type: ignore[assignment]
    assert isinstance(anchor, (Conv2D, Dense))
    operator = as_convolution(anchor)
    x = widen(inputs[0], request.inputs[0]).reshape(operator.input_shape)
    weights = widen(constants.weights, request.weights or "float32").reshape(operator.weight_shape)
    bias = np.asarray(constants.bias, np.float32)
    return operator, x, weights, bias if anchor.epilogue.has_bias else np.zeros_like(bias)


def float_epilogue(
    request: KernelRequest, constants: FloatAnchorConstants, inputs: Sequence[Array], sums: FloatArray
) -> Array:
    """What becomes of the sums of a convolution or dense layer: one addition of the residual, the clamp, the storage."""
    anchor: Anchor = request.operator  # type: ignore[assignment]
    v = sums.reshape(anchor.output_shape)
    if anchor.epilogue.has_residual:
        with np.errstate(over="ignore", invalid="ignore"):
            v = v + widen(inputs[-1], request.inputs[-1]).reshape(anchor.output_shape)
    return narrow(clamp(v, constants.lower, constants.upper), request.output)


def float_add(a: FloatArray, b: FloatArray, lower: float, upper: float) -> FloatArray:
    """clamp(a + b, lower, upper)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return clamp(a + b, lower, upper)


def float_bias_add(x: FloatArray, bias: Array) -> FloatArray:
    """x + bias."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x + np.asarray(bias, np.float32), np.float32)


def float_multiply(a: FloatArray, b: FloatArray) -> FloatArray:
    """a · b."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return np.asarray(a * b, np.float32)


def float_average_pool(operator: AveragePool2D, x: FloatArray) -> FloatArray:
    """Sum from 0 in (kh, kw) order, padding skipped, times float32(1 / n); the product is rounded alone."""
    _, out_h, out_w, _ = operator.output_shape
    sums: FloatArray = np.zeros(operator.output_shape, np.float32)
    # Adding +0 for padding is skipping it: a sum that starts at +0 never becomes −0.
    with np.errstate(over="ignore", invalid="ignore"):
        for view in positions(pad_spatial(x, operator.window, 0.0), operator.window, (out_h, out_w)):
            sums = sums + view
        return sums * pool_reciprocals(operator)[:, :, None]


def pool_reciprocals(operator: AveragePool2D) -> FloatArray:
    """float32(1 / n) for every output position, [out_h, out_w]."""
    rows, cols = operator.divisors
    return (1.0 / np.outer(rows, cols).astype(np.float64)).astype(np.float32)


def float_max_pool(operator: MaxPool2D, x: FloatArray) -> FloatArray:
    """From −∞ in (kh, kw) order: m = v > m ? v : m; padding takes no part, and neither does a NaN."""
    _, out_h, out_w, _ = operator.output_shape
    largest: FloatArray = np.full(operator.output_shape, -np.inf, np.float32)
    for view in positions(pad_spatial(x, operator.window, -np.inf), operator.window, (out_h, out_w)):
        largest = np.where(view > largest, view, largest)
    return largest


def softmax(operator: Softmax, x: FloatArray) -> FloatArray:
    """m = largest x; e = exp(x − m); s = e₀ + e₁ + …, ascending; e / s, a true division."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        e = exp(x - np.fmax.reduce(x, axis=operator.axis, keepdims=True))
        sums = np.add.accumulate(e, axis=operator.axis, dtype=np.float32)  # one addition after the other
        last = np.take(sums, [-1], axis=operator.axis)
        return np.asarray(e / last, np.float32)


def local_response_normalization(operator: LocalResponseNormalization, x: FloatArray) -> FloatArray:
    """s = 0; for the channels j of the window, ascending: s = fma(x_j, x_j, s); those that do not exist are skipped.

    The result is x · power(fma(s, float32(alpha / size), bias), −beta).
    """
    channels = operator.shape[-1]
    before = (operator.size - 1) // 2
    sums: FloatArray = np.zeros(operator.shape, np.float32)
    for shift in range(-before, operator.size - before):
        to = slice(max(0, -shift), min(channels, channels - shift))
        source = slice(max(0, shift), min(channels, channels + shift))
        if to.start < to.stop:
            neighbours = x[..., source]
            sums[..., to] = fma(neighbours, neighbours, sums[..., to])
    base = fma(sums, np.float32(operator.alpha / operator.size), np.float32(operator.bias))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return x * power(base, np.float32(-operator.beta))
