"""The emulated fma is the foundation of the oracle: one wrong rounding would make every comparison meaningless."""

from __future__ import annotations

import numpy as np
import pytest
from exact_arithmetic import bits, exact_fma, float32_array
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.fused_multiply_add import fma, round_sum

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=400, deadline=None)
@given(FINITE, FINITE, FINITE)
def test_equals_rational_arithmetic(a: float, b: float, c: float) -> None:
    """One rounding of the exact result, denormals and overflow included."""
    assert bits(fma(a, b, c)) == bits(exact_fma(a, b, c))


@settings(max_examples=400, deadline=None)
@given(
    st.integers(2**23, 2**24 - 1), st.integers(2**23, 2**24 - 1), st.integers(2**23, 2**24 - 1),
    st.integers(-70, 30), st.booleans(), st.integers(-2, 2),
)  # fmt: skip
def test_close_to_halfway(a: int, b: int, c: int, shift: int, negative: bool, nudge: int) -> None:
    """Sums that fall near, on, and just beside the middle of two float32 numbers, where rounding twice goes wrong."""
    x, y = float(a) * 2.0**-23, float(b + nudge if b + nudge < 2**24 else b) * 2.0**-23
    z = float(-c if negative else c) * 2.0**shift
    assert bits(fma(x, y, z)) == bits(exact_fma(x, y, z))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("beside", [0.0, 2.0**-80, -(2.0**-80)])
@pytest.mark.parametrize("odd", [0, 1])
def test_halfway_and_a_trace_beside_it(sign: float, beside: float, odd: int) -> None:
    """1 + odd·2⁻²³ + 2⁻²⁴ is a tie that goes to even; a trace too small for float64 to hold must break it.

    Rounding the float64 sum to float32 gives the even neighbour always, which is wrong in two of the six cases for
    each sign: the last line proves that the emulation does more than that.
    """
    # The product has 25 significant bits here, and the addend is too small to show in a float64 sum.
    product = np.array([sign * (1 + odd * 2.0**-23 + 2.0**-24)])
    addend = np.array([sign * beside])
    down, up = sign * (1 + odd * 2.0**-23), sign * (1 + (odd + 1) * 2.0**-23)
    expected = up if beside > 0 or (beside == 0 and odd) else down
    assert float(round_sum(product, addend)[0]) == expected
    naive = float((product + addend).astype(np.float32)[0])
    assert (naive == expected) == (beside == 0 or (beside > 0) == bool(odd))


def test_differs_from_an_unfused_product() -> None:
    """If fma were a product and a sum, kernels with contracted or uncontracted products could both pass."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000)).astype(np.float32)
    c = -(a * b)
    assert not np.any(a * b + c)
    assert np.count_nonzero(fma(a, b, c)) > 900


def test_special_values_and_broadcasting() -> None:
    """Infinity and NaN follow IEEE 754; shapes broadcast, scalars stay 0-dimensional."""
    with np.errstate(invalid="ignore"):
        values = fma([np.inf, 0.0, np.inf, 3e38, -3e38], [2.0, np.inf, 1.0, 10.0, 10.0], [1.0, 1.0, -np.inf, 0.0, 0.0])
    np.testing.assert_array_equal(values, float32_array([np.inf, np.nan, np.nan, np.inf, -np.inf]))
    assert fma(np.ones((3, 1)), np.ones((1, 4)), 1.0).shape == (3, 4)
    assert fma(2.0, 3.0, 4.0).shape == ()
    assert np.signbit(fma(-0.0, 1.0, -0.0))
