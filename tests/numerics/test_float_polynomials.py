"""exp, log and what is built on them keep the error bounds that their module states, over the whole of float32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from exact_arithmetic import float32_array
from scipy import special

from tvm_hquant import float_polynomials as polynomials

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


def ulps(value: Floats, exact: Doubles) -> Doubles:
    """Errors in units of the last float32 place of the exact value."""
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), 2.0**-126)))
    return np.abs(value.astype(np.float64) - exact) / 2.0 ** (exponent - 23)


def all_magnitudes() -> Floats:
    """About 50,000 positive float32 numbers, evenly over their bit patterns, denormals included."""
    return np.arange(1, 0x7F800000, 42_043, dtype=np.int32).view(np.float32)


def both_signs() -> Floats:
    return np.concatenate([all_magnitudes(), -all_magnitudes()])


@pytest.mark.parametrize(
    ("function", "exact", "samples", "bound"),
    [
        (polynomials.exp, np.exp, np.linspace(-104, 88.7228, 200_001), 1.0),
        (polynomials.exp, np.exp, np.linspace(-0.7, 0.7, 100_001), 1.0),
        (polynomials.log, np.log, all_magnitudes(), 1.0),
        (polynomials.log, np.log, np.linspace(0.5, 2.1, 200_001), 1.0),
        (polynomials.tanh, np.tanh, both_signs(), 2.0),
        (polynomials.tanh, np.tanh, np.linspace(-10, 10, 100_001), 2.0),
        (polynomials.erf, special.erf, both_signs(), 2.0),
        (polynomials.erf, special.erf, np.linspace(-4.5, 4.5, 100_001), 2.0),
        (polynomials.sigmoid, special.expit, np.linspace(-87, 87, 100_001), 3.0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_error_bound(
    function: Callable[[Floats], Floats], exact: Callable[[Doubles], Doubles], samples: Doubles, bound: float
) -> None:
    """The stated bound in units in the last place holds on dense samples."""
    x = np.asarray(samples, np.float32)
    assert ulps(function(x), exact(x.astype(np.float64))).max() <= bound


@pytest.mark.parametrize("exponent", [-0.75, 0.5, 2.0, -3.3])
def test_error_bound_of_power(exponent: float) -> None:
    """2 + 2·|exponent·ln(base)| ulp."""
    base = np.geomspace(1e-6, 1e6, 50_001).astype(np.float32)
    exponent = float(np.float32(exponent))
    exact = base.astype(np.float64) ** exponent
    allowed = 2 + 2 * np.abs(exponent * np.log(base.astype(np.float64)))
    assert np.all(ulps(polynomials.power(base, exponent), exact) <= allowed)


def test_extremes() -> None:
    """Infinities, zeros, the smallest denormal, overflow and NaN give what mathematics gives."""
    inf, nan, tiny = np.inf, np.nan, 1e-45
    x = float32_array([0.0, -0.0, tiny, -tiny, 1e30, -1e30, inf, -inf, nan])
    expected = {
        polynomials.exp: [1, 1, 1, 1, inf, 0, inf, 0, nan],
        polynomials.sigmoid: [0.5, 0.5, 0.5, 0.5, 1, 0, 1, 0, nan],
        polynomials.tanh: [0, 0, tiny, -tiny, 1, -1, 1, -1, nan],
        polynomials.erf: [0, 0, tiny, -tiny, 1, -1, 1, -1, nan],
    }
    for function, values in expected.items():
        np.testing.assert_array_equal(function(x), float32_array(values), err_msg=function.__name__)
    np.testing.assert_array_equal(
        polynomials.log(float32_array([0, -0.0, inf, -1, nan, 1])), [-inf, -inf, inf, nan, nan, 0]
    )
    assert polynomials.log(np.float32(tiny)) == np.float32(np.log(float(np.float32(tiny))))
    np.testing.assert_array_equal(polynomials.power(float32_array([0.0, 0.0, -1.0]), [2.0, -1.0, 2.0]), [0, inf, nan])


def test_exp_at_its_limits() -> None:
    """The last finite result, the first infinite one, and gradual underflow to 0, of sigmoid too."""
    largest, first_infinite = np.float32(88.72283), np.float32(88.72284)
    assert np.isfinite(polynomials.exp(largest))
    assert np.isinf(polynomials.exp(first_infinite))
    x = np.linspace(-104.5, -87, 20_001).astype(np.float32)
    error = np.abs(polynomials.exp(x).astype(np.float64) - np.exp(x.astype(np.float64)))
    assert error.max() <= 2.0**-149
    assert polynomials.exp(np.float32(-103.0)) > 0
    error = np.abs(polynomials.sigmoid(x).astype(np.float64) - special.expit(x.astype(np.float64)))
    assert error.max() <= 2.0**-125


def test_constants_are_float32() -> None:
    """Kernels hold the constants as float32: none may change by that."""
    numbers = [
        polynomials.LOG2_E, polynomials.LN2_HIGH, polynomials.LN2_LOW, *polynomials.EXP_COEFFICIENTS,
        *polynomials.LOG_COEFFICIENTS, *polynomials.TANH_COEFFICIENTS, *polynomials.ERF_CENTER_COEFFICIENTS,
        *polynomials.ERF_TAIL_COEFFICIENTS,
    ]  # fmt: skip
    assert all(float(np.float32(number)) == number for number in numbers)
    assert float(np.float32(np.log(2))) == polynomials.LN2_HIGH
