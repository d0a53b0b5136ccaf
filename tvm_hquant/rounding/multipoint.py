"""Weights as sums of low-bit tensors, the number of terms chosen for each output channel.

Sources: X. Liu, M. Ye, D. Zhou, Q. Liu, "Post-training Quantization with Multiple Points" (AAAI 2021): each point rounds
what the points before it left. I. Zharikov, A. Sedova, "Post Training Quantization. Flexible continuous modification": the
number of terms is a continuous knob between cost and loss, the step sizes α are variables, and the sum tends to the weights
as terms are added.

Each point is made by one of the project's quantizers (:mod:`tvm_hquant.rounding.point_quantizers`). After every new point the
steps of all points are fitted together, by least squares for the codes that there are, and the codes of each point are made
again for what the others leave; for a channel where that lowers the error, it is kept. With k points the steps are the
solution of k normal equations, Σⱼ ⟨qᵢ, qⱼ⟩·αⱼ = ⟨qᵢ, w⟩, in the inner product in which the quantizer measures errors.

A channel that has fewer terms than the layer's largest number gets zero codes in the others: float32(0) · m adds nothing to a
sum, so there is one arithmetic.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.fused_multiply_add import FloatArray
from tvm_hquant.numerics import smallest_scale
from tvm_hquant.rounding.point_quantizers import NearestQuantizer, PointQuantizer, pooled

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Sum:
    """Codes [points, out, columns] and steps [points, out], float64, and the error of their sum [out]."""

    codes: Doubles
    steps: Doubles
    error: Doubles

    def rest(self, rows: Doubles, without: int | None = None) -> Doubles:
        """What the sum, or all its points but one, leaves of the rows."""
        used = [k for k in range(len(self.codes)) if k != without]
        return np.asarray(rows - np.einsum("po,poc->oc", self.steps[used], self.codes[used]), np.float64)


def multipoint_codes(
    weights: npt.ArrayLike,
    bits: int,
    terms: float,
    quantizer: PointQuantizer | None = None,
    per_channel: bool = True,
) -> tuple[Array, FloatArray]:
    """Codes and scales of points whose sum stands for the weights.

    Args:
        weights: float32 [out, …].
        bits: of each point, 2 to 8.
        terms: mean number of points over the output channels, at least 1. Every channel has one; the others go one by one to
            the channel whose error they lower most.
        quantizer: makes the points; rounding to nearest if not given.
        per_channel: each channel has step sizes of its own; otherwise all share them, and their number of points, which is
            ``terms`` rounded up.

    Returns:
        int8 codes [ceil(terms), out, …] and float32 scales [ceil(terms), out].
    """
    quantizer = quantizer or NearestQuantizer()
    own = np.asarray(weights, np.float64)
    rows = own.reshape(own.shape[0], -1)
    count, tied = math.ceil(terms), not per_channel
    empty = np.zeros((0, *rows.shape)), np.zeros((0, len(rows)))
    sums = [_Sum(*empty, pooled(quantizer.inner(rows, rows), tied))]
    smallest: float | None = None
    for _ in range(count):
        before = sums[-1]
        codes, steps = quantizer.point(before.rest(rows), bits, smallest, tied)
        if smallest is None:
            # A layer of zeros has steps of 1 and no smallest one.
            smallest = smallest_scale(steps) if codes.any() else 0.0
        longer = _measured(
            quantizer,
            rows,
            np.concatenate([before.codes, codes[None]]),
            np.concatenate([before.steps, steps[None]]),
            tied,
        )
        sums.append(_refined(quantizer, rows, longer, bits, smallest, tied))
    kept = np.full(len(rows), count) if tied else allocated_terms(np.array([s.error for s in sums]), terms)
    every = np.arange(len(rows))
    result_codes, result_steps = np.zeros((count, *rows.shape)), np.ones((count, len(rows)))
    for number, found in enumerate(sums[1:], 1):
        chosen = every[kept == number]
        result_codes[:number, chosen] = found.codes[:, chosen]
        result_steps[:number, chosen] = found.steps[:, chosen]
        # Points that a channel lacks have the step that it would have there: no scale is ever far from the others.
        result_steps[number:, chosen] = sums[-1].steps[number:, chosen]
    return result_codes.astype(np.int8).reshape(count, *own.shape), result_steps.astype(np.float32)


def allocated_terms(errors: Doubles, terms: float) -> npt.NDArray[np.int64]:
    """How many points each channel gets.

    Args:
        errors: squared errors [points + 1, channels] with 0, 1, … points.
        terms: mean number of points.

    Returns:
        [channels], each at least 1, together rint(terms · channels). The next point always goes where it lowers the error most;
        ties go to the first channel.
    """
    points, channels = errors.shape[0] - 1, errors.shape[1]
    kept = np.ones(channels, np.int64)
    if points < 2:
        return kept
    queue = [(errors[2, c] - errors[1, c], c) for c in range(channels)]
    heapq.heapify(queue)
    for _ in range(round(terms * channels) - channels):
        if not queue:
            break
        _, channel = heapq.heappop(queue)
        kept[channel] += 1
        if kept[channel] < points:
            following = errors[kept[channel] + 1, channel] - errors[kept[channel], channel]
            heapq.heappush(queue, (following, channel))
    return kept


def _measured(quantizer: PointQuantizer, rows: Doubles, codes: Doubles, steps: Doubles, tied: bool) -> _Sum:
    rest = _Sum(codes, steps, np.zeros(len(rows))).rest(rows)
    return _Sum(codes, steps, pooled(quantizer.inner(rest, rest), tied))


def _refined(quantizer: PointQuantizer, rows: Doubles, found: _Sum, bits: int, smallest: float, tied: bool) -> _Sum:
    """The sum with steps and codes that fit each other: in no channel is the error larger than before."""
    if not quantizer.has_free_steps:
        return found
    for _ in range(quantizer.refinements):
        before = found
        found = _better(
            found, _measured(quantizer, rows, found.codes, _fitted(quantizer, rows, found, smallest, tied), tied)
        )
        for point in range(len(found.codes)):
            codes = found.codes.copy()
            codes[point] = quantizer.codes(found.rest(rows, without=point), found.steps[point], bits)
            found = _better(found, _measured(quantizer, rows, codes, found.steps, tied))
        if np.array_equal(found.error, before.error):
            break
    return _better(
        found, _measured(quantizer, rows, found.codes, _fitted(quantizer, rows, found, smallest, tied), tied)
    )


def _better(one: _Sum, other: _Sum) -> _Sum:
    """Of each channel the one with the smaller error; the first where they are equal."""
    better = other.error < one.error
    return _Sum(
        np.where(better[None, :, None], other.codes, one.codes),
        np.where(better, other.steps, one.steps),
        np.where(better, other.error, one.error),
    )


def _fitted(quantizer: PointQuantizer, rows: Doubles, found: _Sum, smallest: float, tied: bool) -> Doubles:
    """Steps [points, out] with the least error for these codes, as float32 holds them.

    A channel keeps its steps where the least squares would make one too small: a step is positive.
    """
    count = len(found.codes)
    products = np.empty((len(rows), count, count))
    wanted = np.empty((len(rows), count))
    for i in range(count):
        wanted[:, i] = quantizer.inner(found.codes[i], rows)
        for j in range(i + 1):
            products[:, i, j] = products[:, j, i] = quantizer.inner(found.codes[i], found.codes[j])
    products, wanted = pooled(products, tied), pooled(wanted, tied)
    # Codes that are all zero, or equal in two points, leave steps open; those are then the smallest that solve it.
    solved = np.einsum("oij,oj->io", np.linalg.pinv(products, hermitian=True), wanted).astype(np.float32)
    usable = np.all(solved >= smallest, axis=0)
    return np.asarray(np.where(usable, solved, found.steps), np.float64)
