"""Rounds weights so that the output of a layer, not each weight by itself, comes out with the least error.

Rounding to nearest makes each weight's error small. What counts is the error of the sum over all columns of a layer, whose
variance is δᵀ·C·δ, with δ the errors of an output channel's weights and C the covariance of the columns
(:mod:`tvm_hquant.calibration.input_moments`). Neighbouring pixels and related channels are strongly correlated, so an error
in one weight can make up for those in others.

The codes are those of Babai's *nearest plane* method (L. Babai, "On Lovász' lattice reduction and the nearest lattice point
problem", 1986): with C = L·Lᵀ the error is |Lᵀ·δ|², and column by column each code is rounded to what best makes up for the
errors already made. Columns of large variance come first, while there still are others to make up for them. This is what GPTQ
computes (E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023).

The mean of the error, δ·μ, costs nothing: the bias makes up for it (:mod:`tvm_hquant.rounding.bias_correction`), which is
why it is the covariance that counts here and not the second moment.

An estimated covariance is less certain the fewer rows it comes from. Correlations are drawn towards zero by the part that the
number of columns has in the sum of columns and rows, and every variance is raised by a hundredth of the mean variance, which
stands for noise in the activations that no weight can make up for; so columns that were constant while calibrating are
rounded to nearest. An output channel for which rounding to nearest has the smaller δᵀ·C·δ is rounded so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.blas_threads import one_blas_thread
from tvm_hquant.calibration.input_moments import InputMoments

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

NOISE = 0.01
"""Variance that every column has at least, as a part of the mean variance."""
_COLUMNS_AT_ONCE = 64


def least_error_codes(weights: npt.ArrayLike, scales: npt.ArrayLike, limit: int, moments: InputMoments) -> Array:
    """Codes of one layer within ±limit.

    Args:
        weights: float [out, in / groups, kernel_h, kernel_w].
        scales: [out], positive.
        limit: the largest code.
        moments: of the layer's input columns.

    Returns:
        int16, of the shape of ``weights``.
    """
    values = np.asarray(weights, np.float64)
    groups = moments.means.shape[0]
    # In steps of its scale each output channel is an integer problem with one and the same covariance.
    steps = values.reshape(len(values), -1) / np.asarray(scales, np.float64)[:, None]
    targets = steps.reshape(groups, len(values) // groups, -1)
    codes = np.empty_like(targets)
    start = 0
    with one_blas_thread():
        for covariance in moments.covariances:
            block = slice(start, start + covariance.shape[1])
            codes[:, :, block] = closest_codes(targets[:, :, block], regularized(covariance, moments.count), limit)
            start = block.stop
    return codes.reshape(values.shape).astype(np.int16)


def regularized(covariance: Floats, rows: int) -> Floats:
    """A positive definite covariance [groups, columns, columns] from one that was estimated from ``rows`` rows."""
    columns = covariance.shape[1]
    variances: Floats = np.maximum(np.einsum("gii->gi", covariance), 0.0)
    result: Floats = covariance * (rows / (rows + columns))
    mean = variances.mean(axis=1, keepdims=True)
    # A layer that read nothing but constants is rounded to nearest.
    noise = np.where(mean > 0, NOISE * mean, 1.0)
    np.einsum("gii->gi", result)[...] = variances + noise
    return result


def closest_codes(targets: Floats, covariance: Floats, limit: int) -> Floats:
    """Integers q within ±limit with a small error (q − t)ᵀ·C·(q − t).

    Args:
        targets: [groups, out, columns].
        covariance: [groups, columns, columns], positive definite.
        limit: the largest integer.
    """
    nearest = np.clip(np.rint(targets), -limit, limit)
    planes = _nearest_plane(targets, covariance, limit)
    is_better = squared_error(planes, targets, covariance) < squared_error(nearest, targets, covariance)
    return np.where(is_better[:, :, None], planes, nearest)


def squared_error(codes: Floats, targets: Floats, covariance: Floats) -> Floats:
    """(q − t)ᵀ·C·(q − t) for every group and output channel: [groups, out]."""
    errors = codes - targets
    return np.asarray(np.sum((errors @ covariance) * errors, axis=2), np.float64)


def _nearest_plane(targets: Floats, covariance: Floats, limit: int) -> Floats:
    groups, _, columns = targets.shape
    # Ascending variance; the last column, which comes first, is the one with the largest.
    order = np.argsort(np.einsum("gii->gi", covariance).mean(axis=0), kind="stable")
    factor = np.linalg.cholesky(covariance[:, order[:, None], order])
    wanted = targets[:, :, order]
    codes = np.empty_like(wanted)
    # Row i of Lᵀ·δ is L[i, i]·δ[i] + Σ over j > i of L[j, i]·δ[j]; the sums are kept here.
    carried = np.zeros_like(wanted)
    for block in _blocks(columns)[::-1]:
        errors = np.zeros((groups, wanted.shape[1], block.stop - block.start))
        inner = carried[:, :, block].copy()
        for i in range(block.stop - 1, block.start - 1, -1):
            k = i - block.start
            best = wanted[:, :, i] - inner[:, :, k] / factor[:, i, i, None]
            codes[:, :, i] = np.clip(np.rint(best), -limit, limit)
            errors[:, :, k] = codes[:, :, i] - wanted[:, :, i]
            inner[:, :, :k] += errors[:, :, k, None] * factor[:, i, None, block.start : i]
        carried[:, :, : block.start] += errors @ factor[:, block, : block.start]
    result = np.empty_like(codes)
    result[:, :, order] = codes
    return result


def _blocks(columns: int) -> Sequence[slice]:
    """Columns that are worked on together, so that most of the work is products of matrices."""
    return [slice(start, min(start + _COLUMNS_AT_ONCE, columns)) for start in range(0, columns, _COLUMNS_AT_ONCE)]
