"""Steps whose products fit int16 together, found from a layer's weights.

With weights of 7 bits two products of ``vpmaddubsw`` always fit int16 (:mod:`.saturation`), and four mostly
do. Sums of integers have no order, so any two steps may be taken together: where some channel's weights are too large in
two neighbours, each goes with another one. Steps without a partner remain, and are taken alone. Narrower weights let longer
groups meet; where a pixel has channels for a step or few only, these are of several pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_LARGEST_SUM = 128
"""Of the positive, or of the negative weights of a sum: 255 · 128 is within int16."""
_CANDIDATES = 64
"""Steps without a partner that are looked at together."""
_EXCHANGES = 4
"""Pairs that are taken apart for two steps without partners, at most. Few steps are left but where weights are unusual."""


def group_steps(weights: Array, longest: int) -> tuple[Array, tuple[int, int]]:
    """An order of steps: first groups of ``longest`` neighbours, then pairs, then steps without a partner.

    Args:
        weights: int8 [steps, lanes, 4]: of each step and lane, two products that make one sum, then two that make another.
        longest: steps of a group; 2 makes pairs only.

    Returns:
        int64 [steps], the number of groups, and that of pairs.
    """
    halves = weights.reshape(len(weights), -1, 2)
    # [steps, signs of all sums]
    sizes = np.concatenate([_size(np.maximum(halves, 0)), _size(np.minimum(halves, 0))], axis=1)
    steps, groups = np.arange(len(weights)), np.empty((0, longest), np.int64)
    if longest > 2:
        whole = steps[: len(steps) // longest * longest].reshape(-1, longest)
        groups = whole[sizes[whole].sum(axis=1).max(axis=1) <= _LARGEST_SUM]
        steps = np.setdiff1d(steps, groups)
    pairs, unpaired = _paired(sizes, steps)
    order = [groups.reshape(-1), pairs[np.argsort(pairs[:, 0])].reshape(-1), np.sort(unpaired)]
    return np.concatenate(order), (len(groups), len(pairs))


def _paired(sizes: Array, steps: Array) -> tuple[Array, Array]:
    """Pairs [pairs, 2] of some steps, and the steps that are left."""
    neighbours = steps[: len(steps) // 2 * 2].reshape(-1, 2)
    # Neighbours read neighbouring activations, so they stay together where they fit.
    pairs = neighbours[_fit(sizes[neighbours[:, 0]], sizes[neighbours[:, 1]])]
    alone = np.setdiff1d(steps, pairs)
    left = [np.empty(0, np.int64)]
    for start in range(0, len(alone), _CANDIDATES):
        found, rest = _matched(sizes, alone[start : start + _CANDIDATES])
        pairs = np.concatenate([pairs, found])
        left.append(rest)
    unpaired = np.concatenate(left)
    for _ in range(_EXCHANGES):
        exchanged = _exchanged(sizes, pairs, *unpaired[:2]) if len(unpaired) > 1 else None
        if exchanged is not None:
            pairs, unpaired = exchanged, unpaired[2:]
    return pairs, unpaired


def _size(weights: Array) -> Array:
    return np.asarray(np.abs(weights.astype(np.int16)).sum(axis=-1, dtype=np.int16))


def _fit(a: Array, b: Array) -> Array:
    return np.asarray((a + b).max(axis=-1) <= _LARGEST_SUM)


def _matched(sizes: Array, steps: Array) -> tuple[Array, Array]:
    """Pairs [pairs, 2] of some steps, and the steps that are left: those with the fewest possible partners choose first."""
    chosen = sizes[steps]
    fits = _fit(chosen[:, None], chosen[None])
    np.fill_diagonal(fits, False)
    order = np.argsort(fits.sum(axis=1), kind="stable")
    fits, steps = fits[order][:, order], steps[order]
    pairs, left = [], []
    free = np.ones(len(steps), bool)
    for number, step in enumerate(steps):
        if not free[number]:
            continue
        free[number] = False
        partners = fits[number] & free
        partner = int(partners.argmax())
        if partners[partner]:
            free[partner] = False
            pairs.append(sorted((step, steps[partner])))
        else:
            left.append(step)
    return np.array(pairs, np.int64).reshape(-1, 2), np.array(left, np.int64)


def _exchanged(sizes: Array, pairs: Array, a: int, b: int) -> Array | None:
    """The pairs and one more, made of a pair whose members go with one of ``a`` and ``b`` each; None if there is none."""
    for first, second in ((0, 1), (1, 0)):
        fits = _fit(sizes[a], sizes[pairs[:, first]]) & _fit(sizes[b], sizes[pairs[:, second]])
        if fits.any():
            number = int(fits.argmax())
            with_a, with_b = pairs[number, first], pairs[number, second]
            made = [sorted((a, with_a)), sorted((b, with_b))]
            return np.concatenate([np.delete(pairs, number, axis=0), np.array(made, np.int64)])
    return None
