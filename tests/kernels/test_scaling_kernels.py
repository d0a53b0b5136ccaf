"""Scales and shifts per channel between codes against the contract, bit for bit.

Protects the order of channels in the packs, the overlap of last blocks, the exactness of products in float32, and that
compiling such a layer stays quick.
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
from tvm_hquant.kernels.depthwise.scaling import scaling_kernel
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.interface import IntegerAnchorConstants, KernelRequest
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors
from tvm_hquant.operators import Conv2D, Epilogue, Window

FAMILIES = {"avx512_vnni": (16, 32, 64), "avx2": (16, 32)}


@st.composite
def _scalings(draw: st.DrawFn) -> Conv2D:
    channels = draw(st.sampled_from([16, 17, 24, 32, 40, 64, 71, 144]))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 5)), draw(st.integers(1, 5)), channels)
    epilogue = Epilogue(has_bias=True, has_residual=draw(st.booleans()))
    return Conv2D(shape, channels, Window((1, 1)), channels, epilogue)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(operator=_scalings(), seed=st.integers(0, 2**32 - 1), width=st.sampled_from([16, 32, 64]), ends=code_endings())
def test_is_exact(family: str, operator: Conv2D, seed: int, width: int, ends: CodeEnding) -> None:
    """Any number of channels and pixels, residuals, every end of the values."""
    if family not in HOST:
        pytest.skip(f"this CPU has no {family}")
    inputs = ("uint8",) * (1 + operator.epilogue.has_residual)
    case = random_case(np.random.default_rng(seed), KernelRequest(operator, inputs, "uint8", "int8"), 127)
    request, constants, tensors = case
    assert isinstance(constants, IntegerAnchorConstants)
    constants = ends.of(constants)
    request = replace(request, ending=proven_ending(constants))
    vectors = [ByteVectors(w, "vpmaddwd") for w in (min(width, FAMILIES[family][-1]), 16)]
    kernel = scaling_kernel(request, vectors, family)
    assert kernel is not None
    actual = run_kernel(kernel, constants, tensors, TARGETS[family])
    np.testing.assert_array_equal(actual, numerics.evaluate(request, constants, tensors), kernel.name)


@pytest.mark.parametrize("instruction_set", ["avx512_vnni", "avx2", "arm_dotprod", "arm_neon"])
def test_which_kernel_serves_it(instruction_set: str) -> None:
    """The instruction sets with vectors of bytes take it; other windows, few channels and wide codes are for other kernels."""
    families = families_for_target((instruction_set, "reference"))
    plain = KernelRequest(Conv2D((1, 6, 6, 64), 64, Window((1, 1)), 64), ("uint8",), "uint8", "int8")
    others = [
        replace(plain, operator=Conv2D((1, 6, 6, 8), 8, Window((1, 1)), 8)),
        replace(plain, operator=Conv2D((1, 6, 6, 64), 64, Window((1, 1), (2, 2)), 64)),
        replace(plain, inputs=("uint16",)),
        replace(plain, output="float32"),
        replace(plain, weight_points=2),
    ]
    assert "[scale " in select_kernel(families, plain).name
    assert not [r for r in others if "[scale " in select_kernel(families, r).name]


def test_its_code_is_short() -> None:
    """A network with a hundred such layers compiles them all: each is a loop, nothing is written out for pixels."""
    operator = Conv2D((1, 56, 56, 256), 256, Window((1, 1)), 256)
    vectors = [ByteVectors(64, "vpdpbusd")]
    kernel = scaling_kernel(KernelRequest(operator, ("uint8",), "uint8", "int8"), vectors, "avx512_vnni")
    assert kernel is not None
    assert kernel.function.script().count("\n") < 120
