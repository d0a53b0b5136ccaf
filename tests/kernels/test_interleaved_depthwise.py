"""Depthwise kernels on byte vectors against the contract, bit for bit.

Protects the order in which channels come out of the packs, rows and columns outside the input, kernels taller than a word,
the overlap of last blocks, and clamping by saturation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.anchor_cases import HOST, TARGETS, random_case, run_kernel
from tests.kernels.code_endings import CodeEnding, code_endings
from tvm_hquant import numerics
from tvm_hquant.kernels.depthwise.interleaved import interleaved_depthwise_kernel
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.interface import IntegerAnchorConstants, KernelRequest
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors, WordProduct
from tvm_hquant.operators import Conv2D, Window

PRODUCTS: list[tuple[WordProduct, str, int]] = [
    ("vpdpbusd", "avx512_vnni", 127), ("vpmaddubsw", "avx2", 64), ("vpmaddubsw", "avx2", 7), ("vpmaddwd", "avx2", 127)
]  # fmt: skip


@st.composite
def _convolutions(draw: st.DrawFn) -> Conv2D:
    channels = draw(st.sampled_from([16, 17, 24, 32, 40, 64, 71, 144]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 2)]))
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    height = draw(st.integers((kernel[0] - 1) * dilation[0] + 1, 11))
    width = draw(st.integers((kernel[1] - 1) * dilation[1] + 1, 11))
    strides = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    shape = (draw(st.integers(1, 2)), height, width, channels)
    return Conv2D(shape, channels, Window(kernel, strides, padding, dilation), channels)


@pytest.mark.parametrize(("product", "family", "limit"), PRODUCTS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    operator=_convolutions(), seed=st.integers(0, 2**32 - 1), width=st.sampled_from([16, 32, 64]), ends=code_endings()
)
def test_is_exact(
    product: WordProduct, family: str, limit: int, operator: Conv2D, seed: int, width: int, ends: CodeEnding
) -> None:
    """Any window, channels of all widths, every end of the values."""
    if family not in HOST:
        pytest.skip(f"this CPU has no {family}")
    rng = np.random.default_rng(seed)
    request, constants, inputs = random_case(rng, KernelRequest(operator, ("uint8",), "uint8", "int8"), limit)
    assert isinstance(constants, IntegerAnchorConstants)
    constants = ends.of(constants)
    request = replace(request, ending=proven_ending(constants))
    widths = (min(width, 32) if family == "avx2" else width, 16)
    kernel = interleaved_depthwise_kernel(request, [ByteVectors(w, product) for w in widths], family)
    assert kernel is not None
    if limit == 7:
        assert ("chain" in kernel.name) == (operator.window.kernel[1] > 1)
    actual = run_kernel(kernel, constants, inputs, TARGETS[family])
    np.testing.assert_array_equal(actual, numerics.evaluate(request, constants, inputs), kernel.name)


def test_what_other_kernels_do() -> None:
    """Other storages, residuals, weights of several points and very few channels are left to the general kernel."""
    operator = Conv2D((1, 5, 5, 32), 32, Window((3, 3)), 32)
    plain = KernelRequest(operator, ("uint8",), "uint8", "int8")
    vectors = [ByteVectors(width, "vpmaddwd") for width in (16, 32)]
    assert interleaved_depthwise_kernel(plain, vectors, "avx2") is not None
    narrow = replace(plain, operator=Conv2D((1, 5, 5, 8), 8, Window((3, 3)), 8))
    others = [
        replace(plain, output="float32"),
        replace(plain, inputs=("uint16",)),
        replace(plain, weight_points=2),
        narrow,
    ]
    found = [interleaved_depthwise_kernel(request, vectors, "avx2") for request in others]
    assert found == [None] * len(others)
