"""Pairs of steps for 7-bit weights.

Protects exactness on AVX2, where a pair whose products leave int16 would give wrong sums, and the speed, which needs pairs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.kernels.anchor_cases import HOST, TARGETS, random_case, run_kernel
from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.convolution.step_groups import group_steps
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES
from tvm_hquant.operators import Conv2D, Window


def most_pairs(fits: np.ndarray) -> int:
    """The size of a largest matching, by trying all."""
    if len(fits) < 2:
        return 0
    best = most_pairs(fits[1:, 1:])
    for partner in np.flatnonzero(fits[0]):
        others = [i for i in range(1, len(fits)) if i != partner]
        best = max(best, 1 + most_pairs(fits[np.ix_(others, others)]))
    return best


def both_fit(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether no sum of two steps' products leaves int16, whatever the activations are."""
    sums = np.concatenate([a.reshape(-1, 2), b.reshape(-1, 2)], axis=1).astype(int)
    highest, lowest = 255 * np.maximum(sums, 0).sum(axis=1), 255 * np.minimum(sums, 0).sum(axis=1)
    return bool(highest.max() <= 32767 and lowest.min() >= -32768)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.int8, st.tuples(st.integers(1, 7), st.integers(1, 3), st.just(4)), elements=st.integers(-64, 64)),
)
def test_pairs_fit_and_are_nearly_all_there_are(weights: np.ndarray) -> None:
    """Every step stands in the order once, all pairs fit int16, and no two steps that are left fit together."""
    order, (groups, count) = group_steps(weights, 2)
    assert groups == 0
    assert sorted(order) == [*range(len(weights))]
    pairs, left = order[: 2 * count].reshape(-1, 2), order[2 * count :]
    assert all(both_fit(weights[a], weights[b]) for a, b in pairs)
    assert not any(both_fit(weights[a], weights[b]) for a in left for b in left if a < b)
    fits = np.array([[both_fit(a, b) for b in weights] for a in weights])
    # A matching that cannot be extended has at least half the pairs of the largest.
    assert 2 * count >= most_pairs(fits & ~np.eye(len(weights), dtype=bool))


def test_trained_weights_are_all_paired() -> None:
    """Normally distributed 7-bit weights: a step that fits no neighbour finds another partner, few as they are."""
    rng = np.random.default_rng(0)
    for steps in (16, 144):
        values = rng.normal(size=(steps, 16, 4))
        weights = np.rint(values * (63 / np.abs(values).max(axis=(0, 2), keepdims=True))).astype(np.int8)
        neighbours = [both_fit(weights[i], weights[i + 1]) for i in range(0, steps, 2)]
        assert not all(neighbours) or steps == 144
        assert group_steps(weights, 2)[1] == (0, steps // 2)


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
@pytest.mark.parametrize(
    "operator",
    [
        Conv2D((1, 5, 6, 32), 24, Window((3, 3), (1, 2), (1, 1, 1, 1))),
        Conv2D((2, 5, 4, 18), 10, Window((2, 2), dilation=(1, 2)), 1),
        Conv2D((1, 3, 7, 78), 24, Window((1, 1)), 3),
        Conv2D((1, 11, 11, 3), 16, Window((3, 3), (2, 2))),
    ],
    ids=["padded", "dilated", "grouped", "stem"],
)
def test_steps_in_another_order_give_the_same_sums(operator: Conv2D) -> None:
    """One compiled kernel computes layers with all, some and no pairs, with activations at both ends of their range."""
    rng = np.random.default_rng(0)
    kernel = ANCHOR_FAMILIES["avx2"].kernel(
        KernelRequest(operator, ("uint8",), "uint8", "int8", saturation_free_pairs=1)
    )
    assert kernel is not None
    assert "pairs" in kernel.name
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, target=tvm.target.Target(TARGETS["avx2"]), tir_pipeline=CPU_PIPELINE)
    counts = []
    for smallest, largest in ((0, 10), (0, 64), (64, 64)):
        _, constants, _ = random_case(rng, kernel.request, 64)
        codes = (
            rng.integers(smallest, largest + 1, constants.weight_codes.shape)
            * rng.choice([-1, 1], operator.out_channels)[:, None, None, None]
        )
        constants = replace(constants, weight_codes=codes.astype(np.int8))
        x = rng.choice(np.array([0, 1, 254, 255], np.uint8), operator.input_shape)
        packed = kernel.pack(constants)
        output = tvm.runtime.tensor(np.zeros(operator.output_shape, np.uint8))
        library["kernel"](*(tvm.runtime.tensor(a) for a in (x, *packed)), output)
        np.testing.assert_array_equal(output.numpy(), numerics.evaluate(kernel.request, constants, [x]))
        counts.append(int(packed[-1][1]))
    assert counts[0] > counts[1] >= counts[2] == 0


@pytest.mark.skipif("avx2" not in HOST, reason="this CPU has no AVX2")
def test_groups_of_several_pixels() -> None:
    """Four-bit weights of four channels: eight steps of a kernel row or two meet in int16, where these let them."""
    operator = Conv2D((1, 13, 15, 4), 24, Window((5, 5), (2, 2), (2, 2, 2, 2)))
    rng = np.random.default_rng(0)
    for limit, groups in ((7, 3), (31, 0)):
        request, constants, inputs = random_case(rng, KernelRequest(operator, ("uint8",), "uint8", "int8"), limit)
        kernel = ANCHOR_FAMILIES["avx2"].kernel(replace(request, saturation_free_pairs=8))
        assert kernel is not None
        assert kernel.pack(constants)[-1][0] == groups
        expected = numerics.evaluate(request, constants, inputs)
        np.testing.assert_array_equal(run_kernel(kernel, constants, inputs, TARGETS["avx2"]), expected)


@pytest.mark.parametrize(("limit", "groups"), [(8, 3), (9, 0)])
def test_groups_fit(limit: int, groups: int) -> None:
    """Eight steps of weights of one sign sum 16 of them: 255 · 16 · 8 is within int16, 255 · 16 · 9 is not."""
    order, counts = group_steps(np.full((25, 2, 4), limit, np.int8), 8)
    assert sorted(order) == [*range(25)]
    assert counts == (groups, 12 if groups == 0 else 0)
