"""What constants prove about the clamp, and kernels that rely on it.

Protects that a value is converted before it is clamped only where no activations make it leave int32, that what the packs
saturate is all of the clamp where limits and zero point are left out, and that kernels give the contract's codes with every
such proof.
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
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.interface import IntegerAnchorConstants, KernelRequest, ProvenEnding, Requantization
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import Conv2D, Epilogue, Window

FAMILIES = [f for f in ("avx512_vnni", "avx_vnni", "avx2") if f in HOST or (f == "avx_vnni" and "avx512_vnni" in HOST)]


def _constants(
    codes: list[int], multiplier: float = 0.01, offset: float = 0.0, zero_point: int = 3,
    end: tuple[int, int, int] = (0, 255, 0), residual: tuple[float, int] = (0.0, 0),
) -> IntegerAnchorConstants:  # fmt: skip
    """A 1×1 layer of one output channel; ``end`` is the first and the last code, and the zero point."""
    first, last, output_zero_point = end
    return IntegerAnchorConstants(
        np.array(codes, np.int8).reshape(1, 1, -1, 1, 1),
        zero_point,
        np.full((1, 1), multiplier, np.float32),
        np.full(1, offset, np.float32),
        Requantization(float(first - output_zero_point), float(last - output_zero_point), output_zero_point),
        *residual,
    )


@settings(max_examples=60, deadline=None)
@given(
    codes=st.lists(st.integers(-127, 127), min_size=1, max_size=12),
    zero_point=st.integers(0, 255),
    magnitude=st.floats(0.0, 7.0),
    offset=st.one_of(st.floats(-3e9, 3e9, width=32), st.floats(-2e4, 2e4, width=32)),
    residual=st.tuples(st.sampled_from([0.0, 1.0, 5e6]), st.integers(0, 255)),
    data=st.data(),
)
def test_proven_values_fit_int32(codes, zero_point, magnitude, offset, residual, data) -> None:
    """Neither activations that add to the sum alone nor a part of the window make a proven value leave int32."""
    constants = _constants(codes, 10.0**magnitude, offset, zero_point, residual=residual)
    if not proven_ending(constants).fits_int32:
        return
    taken = np.array(data.draw(st.lists(st.booleans(), min_size=len(codes), max_size=len(codes))))
    for sign in (1, -1):
        weights = np.array(codes) * taken
        activations = np.where(sign * weights > 0, 255, 0)
        total = np.float64((weights * (activations - zero_point)).sum())
        distance = sign * max(sign * (q - residual[1]) for q in (0, 255))
        value = total * float(constants.multiplier[0, 0]) + float(constants.offset[0]) + residual[0] * distance
        assert abs(value) < (2**15 - 255 if proven_ending(constants).fits_int16 else 2**31)


def test_what_is_proven() -> None:
    """Ordinary constants prove all; each of the four needs what it says, and a residual counts."""
    assert proven_ending(_constants([5, -7])) == ProvenEnding(True, True, True, True)
    assert proven_ending(_constants([5, -7], end=(0, 255, 9))) == ProvenEnding(True, False, True, True)
    assert proven_ending(_constants([5, -7], end=(0, 254, 0))) == ProvenEnding(True, True, False, True)
    assert proven_ending(_constants([5, -7], end=(1, 255, 1))) == ProvenEnding(True, False, False, True)
    assert proven_ending(_constants([5, -7], multiplier=100.0)) == ProvenEnding(True, True, True, False)
    for unbounded in (
        _constants([5, -7], multiplier=1e7),
        _constants([5, -7], offset=2e9),
        _constants([5, -7], offset=float("nan")),
        _constants([5, -7], multiplier=float("inf")),
        _constants([5, -7], residual=(1e7, 200)),
    ):
        assert not proven_ending(unbounded).fits_int32


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    ends=code_endings(),
    has_residual=st.booleans(),
    channels=st.sampled_from([8, 16, 24, 37, 64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_kernels_clamp_by_saturation(
    family: str, ends: CodeEnding, has_residual: bool, channels: int, seed: int
) -> None:
    """Values in and out of all ranges, with all that their constants prove, and with less."""
    operator = Conv2D((1, 3, 5, 8), channels, Window((1, 1)), 1, Epilogue(True, has_residual))
    rng = np.random.default_rng(seed)
    request, constants, inputs = random_case(
        rng, KernelRequest(operator, ("uint8",) * (1 + has_residual), "uint8", "int8"), int(rng.choice([7, 127]))
    )
    assert isinstance(constants, IntegerAnchorConstants)
    constants = ends.of(constants)
    proven = proven_ending(constants)
    for ending in {proven, replace(proven, fits_int32=False)}:
        kernel = select_kernel(families_for_target((family,)), replace(request, ending=ending))
        actual = run_kernel(kernel, constants, inputs, TARGETS[family])
        np.testing.assert_array_equal(actual, numerics.evaluate(request, constants, inputs), f"{kernel.name} {ending}")
