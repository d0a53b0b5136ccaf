"""Normalization over groups of channels: layer, instance and group normalization.

Lei Ba, Kiros and Hinton, *Layer normalization*, arXiv:1607.06450, equation 3; Wu and He, *Group normalization*,
arXiv:1803.08494, equations 1 to 6.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tvm_hquant.fused_multiply_add import FloatArray, fma
from tvm_hquant.operators import GroupNormalization

PARTIAL_SUMS: Final = 16
"""Sums that are added side by side: channel c of a group is added to sum c mod 16. A vector of AVX-512, two of AVX2."""


def group_normalization(operator: GroupNormalization, x: FloatArray, gamma: FloatArray, beta: FloatArray) -> FloatArray:
    """The steps for each group of n elements, each operation rounded alone.

    t_j = +0 for j = 0…15; for positions ascending, for channels c ascending: t_j = t_j + x with j = c mod 16. The sum of all
    is (t_j + t_{j+8}), of these 8 the same with 4, then 2, then 1. mean = sum / n. Likewise with d = x − mean and
    t_j = fma(d, d, t_j): variance = sum / n. r = 1 / √(variance + epsilon). The result is fma(d · r, gamma, beta).

    Args:
        operator: shapes, groups and epsilon.
        x: float32 of the operator's shape.
        gamma, beta: float32 [channels].

    Returns:
        float32 of the operator's shape.
    """
    shape = (operator.outer, operator.positions, operator.groups, operator.group_channels)
    count = np.float32(operator.positions * operator.group_channels)
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        values = x.reshape(shape)
        mean = _sum_of_groups(values, square=False) / count
        deviation = values - mean[:, None, :, None]
        variance = _sum_of_groups(deviation, square=True) / count
        r = np.float32(1) / np.sqrt(variance + np.float32(operator.epsilon))
        scaled = deviation * r[:, None, :, None]
    factors, shifts = (np.asarray(v, np.float32).reshape(shape[2:]) for v in (gamma, beta))
    return fma(scaled, factors, shifts).reshape(operator.shape)


def _sum_of_groups(values: FloatArray, square: bool) -> FloatArray:
    """Sums of [outer, positions, groups, channels] over positions and channels, [outer, groups], in the contract's order."""
    outer, positions, groups, channels = values.shape
    # Adding +0 for channels beyond a group changes nothing: a sum that starts at +0 never becomes −0.
    padded = np.pad(values, ((0, 0), (0, 0), (0, 0), (0, -channels % PARTIAL_SUMS)))
    steps = np.moveaxis(padded.reshape(outer, positions, groups, -1, PARTIAL_SUMS), (1, 3), (0, 1))
    total: FloatArray = np.zeros((outer, groups, PARTIAL_SUMS), np.float32)
    for step in steps.reshape(-1, outer, groups, PARTIAL_SUMS):
        total = fma(step, step, total) if square else total + step
    half = PARTIAL_SUMS // 2
    while half:
        total = total[..., :half] + total[..., half : 2 * half]
        half //= 2
    return total[..., 0]
