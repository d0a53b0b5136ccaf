"""Average pools of codes that share sums of columns, against the arithmetic contract, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_matches_contract, seeds

from tvm_hquant.kernels.interface import IntegerElementwiseConstants, KernelRequest, Requantization
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR
from tvm_hquant.kernels.weightless.overlapping_pools import overlapping_pool_kernel
from tvm_hquant.operators import AveragePool2D, Window

TARGET = {"kind": "llvm"}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(2, 9), st.integers(2, 9), st.integers(1, 70)),
    kernel=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    data=st.data(),
    lanes=st.sampled_from([4, 8, 16]),
    cores=st.sampled_from([1, 4]),
    seed=seeds,
)
def test_random_pools_match_the_contract(shape, kernel, data, lanes, cores, seed) -> None:
    """Any padding, counted or not, windows beyond the map on one side or both, and outputs of every storage."""
    padding = tuple(data.draw(st.integers(0, k - 1)) for k in (*kernel, *kernel))
    size = [shape[axis + 1] + padding[axis] + padding[axis + 2] - kernel[axis] + 1 for axis in (0, 1)]
    if min(size) < 1 or size == [1, 1]:
        return
    counted = tuple(data.draw(st.integers(0, p)) for p in padding)
    storage = data.draw(st.sampled_from(["uint8", "uint16", "float32"]))
    operator = AveragePool2D(shape, Window(kernel, (1, 1), padding), counted)
    request = KernelRequest(operator, ("uint8",), storage)
    kernel_ = overlapping_pool_kernel(request, lanes, replace(ASSUMED_PROCESSOR, cores=cores))
    rng = np.random.default_rng(seed)
    rows, columns = operator.divisors
    factors = (np.float32(rng.uniform(0.2, 2)) / np.outer(rows, columns)).astype(np.float32)
    limits = {"uint8": (-20.0, 235.0, 20), "uint16": (-300.0, 65000.0, 300), "float32": (-50.0, 50.0, 0)}[storage]
    constants = IntegerElementwiseConstants((int(rng.integers(0, 256)),), (factors,), Requantization(*limits))
    assert_matches_contract(kernel_, Case(request, constants, seed), TARGET)


def test_largest_window_of_largest_codes() -> None:
    """257 pixels of 255 are all that 16 bits hold; one pixel more is left to the general kernel."""
    operator = AveragePool2D((1, 17, 18, 16), Window((16, 16)))
    request = KernelRequest(operator, ("uint8",), "float32")
    factors = np.ones(operator.output_shape[1:3], np.float32)
    constants = IntegerElementwiseConstants((3,), (factors,), Requantization(-1e9, 1e9, 0))

    class Largest(Case):
        def inputs(self) -> list[np.ndarray]:
            return [np.full(operator.input_shape, 255, np.uint8)]

    assert_matches_contract(overlapping_pool_kernel(request, 8), Largest(request, constants, 0), TARGET)
    wider = KernelRequest(AveragePool2D((1, 17, 18, 16), Window((17, 16))), ("uint8",), "float32")
    assert overlapping_pool_kernel(wider, 8) is None


@pytest.mark.parametrize(
    "operator",
    [
        AveragePool2D((1, 8, 8, 16), Window((3, 3), (2, 2))),
        AveragePool2D((1, 8, 8, 16), Window((1, 3))),
        AveragePool2D((1, 8, 8, 16), Window((8, 8))),
        AveragePool2D((1, 8, 8, 16), Window((3, 3), dilation=(2, 2))),
    ],
    ids=lambda o: f"{o.window.kernel} {o.window.strides} {o.window.dilation}",
)
def test_other_pools_are_left_to_others(operator: AveragePool2D) -> None:
    """Windows further apart, of one row, dilated, and a single one share no sums."""
    assert overlapping_pool_kernel(KernelRequest(operator, ("uint8",), "uint8"), 8) is None
