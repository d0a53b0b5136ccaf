"""exp, log, power, tanh, sigmoid and erf of float32, so defined that every machine computes the same bits.

Libraries of C differ from one another in the last bit, and TVM's ``exp`` calls them lane by lane. The functions here
are polynomials whose every step is one fused multiply-add, one rounded operation (+ · /), a comparison, a rounding to
an integer, or an operation on bits. Kernels repeat these steps one for one with the constants of this module; no step
may be merged with another or moved.

=============  =====================================================================================
function       largest error, measured against float64 (``tests/numerics/test_float_polynomials.py``)
=============  =====================================================================================
``exp``        1 ulp; results below 2⁻¹²⁶ within one unit of the smallest denormal
``log``        1 ulp
``power``      2 + 2·|exponent·ln(base)| ulp
``tanh``       2 ulp
``sigmoid``    3 ulp above −87; below, within 2⁻¹²⁵
``erf``        2 ulp
=============  =====================================================================================

The coefficients were fitted for this project: minimax polynomials by Lawson's iteratively reweighted least squares in
float64, each coefficient being rounded to float32 before the following ones were fitted again.
A NaN gives a NaN.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from tvm_hquant.fused_multiply_add import FloatArray, fma

LOG2_E: Final = float.fromhex("0x1.715476p+0")
"""1 / ln 2."""
LN2_HIGH: Final = float.fromhex("0x1.62e430p-1")
"""float32(ln 2)."""
LN2_LOW: Final = float.fromhex("-0x1.05c610p-29")
"""float32(ln 2 − LN2_HIGH)."""

EXP_LOWEST: Final = -104.0
"""Below this exp is 0, and so it is at this."""
EXP_HIGHEST: Final = 89.0
"""Above this exp is infinite, and so it is at this."""
EXP_COEFFICIENTS: Final = (
    1.0,
    1.0,
    0.5,
    float.fromhex("0x1.555554p-3"),
    float.fromhex("0x1.5554e8p-5"),
    float.fromhex("0x1.11130ep-7"),
    float.fromhex("0x1.6d4ccap-10"),
    float.fromhex("0x1.9dfc08p-13"),
)
"""exp(r) = Σ cᵢ·rⁱ for |r| ≤ ln(2)/2, ascending; error 2⁻³³ of the value."""

SMALLEST_NORMAL: Final = float.fromhex("0x1p-126")
DENORMAL_SCALE: Final = float.fromhex("0x1p25")
DENORMAL_SCALE_EXPONENT: Final = 25
SQRT_HALF_BITS: Final = 0x3F3504F3
"""Bits of float32(√½): mantissas are taken from [√½, √2)."""
ONE_BITS: Final = 0x3F800000
MANTISSA_MASK: Final = 0x007FFFFF
NAN_BITS: Final = 0x7FC00000
SIGN_MASK: Final = -0x80000000
"""The sign bit of a float32, as an int32."""
LOG_COEFFICIENTS: Final = (
    -0.5,
    float.fromhex("0x1.555548p-2"),
    float.fromhex("-0x1.000006p-2"),
    float.fromhex("0x1.99a478p-3"),
    float.fromhex("-0x1.555c4ap-3"),
    float.fromhex("0x1.233b68p-3"),
    float.fromhex("-0x1.fc2740p-4"),
    float.fromhex("0x1.e6c298p-4"),
    float.fromhex("-0x1.de0e4cp-4"),
    float.fromhex("0x1.147cbep-4"),
)
"""log(1 + f) = f + f²·Σ cᵢ·fⁱ for √½ ≤ 1 + f < √2, ascending; error 2⁻³⁰ of the value."""

TANH_THRESHOLD: Final = 0.625
TANH_COEFFICIENTS: Final = (
    float.fromhex("-0x1.555532p-2"),
    float.fromhex("0x1.1106fap-3"),
    float.fromhex("-0x1.b836c8p-5"),
    float.fromhex("0x1.52041cp-6"),
    float.fromhex("-0x1.754f46p-8"),
)
"""tanh(x) = x + x·z·Σ cᵢ·zⁱ, z = x², for |x| < TANH_THRESHOLD, ascending; error 2⁻²⁷ of the value."""

ERF_THRESHOLD: Final = 1.0
ERF_HIGHEST: Final = 4.0
"""From here on erf is 1 in float32."""
ERF_CENTER_COEFFICIENTS: Final = (
    float.fromhex("0x1.06eba8p-3"),
    float.fromhex("-0x1.81273ep-2"),
    float.fromhex("0x1.ce2ce6p-4"),
    float.fromhex("-0x1.b7f71ap-6"),
    float.fromhex("0x1.53f224p-8"),
    float.fromhex("-0x1.a3515ep-11"),
    float.fromhex("0x1.4771fep-14"),
)
"""erf(x) = x + x·Σ cᵢ·zⁱ, z = x², for |x| < ERF_THRESHOLD, ascending; error 2⁻²⁹ of the value."""
ERF_TAIL_COEFFICIENTS: Final = (
    float.fromhex("0x1.8a5954p-13"),
    float.fromhex("-0x1.212c0ep+0"),
    float.fromhex("-0x1.443560p-1"),
    float.fromhex("-0x1.bc1564p-4"),
    float.fromhex("0x1.9d03ecp-6"),
    float.fromhex("-0x1.138e30p-8"),
    float.fromhex("0x1.cecaacp-12"),
    float.fromhex("-0x1.6bddb2p-16"),
)
"""1 − erf(x) = exp(Σ cᵢ·xⁱ) for ERF_THRESHOLD ≤ x ≤ ERF_HIGHEST, ascending; error 2⁻³⁵ (absolute)."""


def _polynomial(coefficients: tuple[float, ...], x: FloatArray) -> FloatArray:
    """Horner's scheme, one fma for every coefficient below the highest."""
    value: FloatArray = np.full(np.shape(x), coefficients[-1], np.float32)
    for coefficient in reversed(coefficients[:-1]):
        value = fma(value, x, np.float32(coefficient))
    return value


def _power_of_two(exponent: npt.NDArray[np.int32]) -> FloatArray:
    """2^exponent for −126 ≤ exponent ≤ 127, from its bits."""
    return ((exponent + np.int32(127)) << np.int32(23)).astype(np.int32).view(np.float32)


def _bits(x: FloatArray) -> npt.NDArray[np.int32]:
    return np.asarray(x, np.float32, order="C").view(np.int32)


def _absolute(x: FloatArray) -> FloatArray:
    return (_bits(x) & np.int32(~SIGN_MASK)).view(np.float32)


def _with_sign_of(magnitude: FloatArray, sign: FloatArray) -> FloatArray:
    return (_bits(magnitude) | (_bits(sign) & np.int32(SIGN_MASK))).view(np.float32)


def _array(x: npt.ArrayLike) -> FloatArray:
    return np.asarray(x, np.float32)


def exp(x: npt.ArrayLike) -> FloatArray:
    """e to the power of float32 ``x``, any shape.

    Steps: t = x > EXP_LOWEST ? x : EXP_LOWEST; t = t < EXP_HIGHEST ? t : EXP_HIGHEST;
    n = rint(t · LOG2_E), ties to even; r = fma(n, −LN2_HIGH, t); r = fma(n, −LN2_LOW, r);
    p = Horner(EXP_COEFFICIENTS, r); k = int32(n); h = k >> 1 (arithmetic); result = (p · 2^h) · 2^(k − h);
    where x is not x, x.
    """
    x = _array(x)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        t = np.where(x > np.float32(EXP_LOWEST), x, np.float32(EXP_LOWEST))
        t = np.where(t < np.float32(EXP_HIGHEST), t, np.float32(EXP_HIGHEST))
        n = np.rint(t * np.float32(LOG2_E))
        r = fma(n, np.float32(-LN2_HIGH), t)
        r = fma(n, np.float32(-LN2_LOW), r)
        p = _polynomial(EXP_COEFFICIENTS, r)
        k = n.astype(np.int32)
        half = k >> np.int32(1)
        result = (p * _power_of_two(half)) * _power_of_two(k - half)
    return np.where(x == x, result, x)


def log(x: npt.ArrayLike) -> FloatArray:
    """Natural logarithm of float32 ``x``, any shape. log(±0) = −∞, log(negative) = NaN, log(∞) = ∞.

    Steps: small = x < SMALLEST_NORMAL; y = small ? x · DENORMAL_SCALE : x;
    b = int32 bits of y + (ONE_BITS − SQRT_HALF_BITS); k = (b >> 23) − 127 − (small ? DENORMAL_SCALE_EXPONENT : 0);
    m = float32 of bits (b & MANTISSA_MASK) + SQRT_HALF_BITS; f = m − 1; z = f · f; w = Horner(LOG_COEFFICIENTS, f);
    r = fma(z, w, f); r = fma(float32(k), LN2_LOW, r); r = fma(float32(k), LN2_HIGH, r).
    Then r = x < ∞ ? r : x (NaN and ∞ pass); r = x < 0 ? NaN : r; r = x == 0 ? −∞ : r.
    """
    x = _array(x)
    with np.errstate(over="ignore", invalid="ignore"):
        small = x < np.float32(SMALLEST_NORMAL)
        y = np.where(small, x * np.float32(DENORMAL_SCALE), x)
        b = _bits(y) + np.int32(ONE_BITS - SQRT_HALF_BITS)
        k = (b >> np.int32(23)) - np.int32(127) - np.where(small, np.int32(DENORMAL_SCALE_EXPONENT), np.int32(0))
        mantissa = ((b & np.int32(MANTISSA_MASK)) + np.int32(SQRT_HALF_BITS)).view(np.float32)
        f = mantissa - np.float32(1)
        z = f * f
        w = _polynomial(LOG_COEFFICIENTS, f)
        n = k.astype(np.float32)
        result = fma(n, np.float32(LN2_HIGH), fma(n, np.float32(LN2_LOW), fma(z, w, f)))
        result = np.where(x < np.float32(np.inf), result, x)
        result = np.where(x < 0, np.float32(np.nan), result)
    return np.where(x == 0, np.float32(-np.inf), result)


def power(base: npt.ArrayLike, exponent: npt.ArrayLike) -> FloatArray:
    """float32 ``base`` (not negative) to the power of float32 ``exponent`` (not 0): exp(exponent · log(base)).

    The arguments are broadcast; the product is rounded alone. A negative base gives NaN; 0 gives 0 or ∞.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return exp(_array(exponent) * log(base))


def sigmoid(x: npt.ArrayLike) -> FloatArray:
    """1 / (1 + exp(−x)) of float32 ``x``, any shape: one negation, exp, one addition, one true division."""
    return np.float32(1) / (np.float32(1) + exp(-_array(x)))


def tanh(x: npt.ArrayLike) -> FloatArray:
    """Hyperbolic tangent of float32 ``x``, any shape.

    Steps, a = |x|: z = x · x; near = fma(x, z · Horner(TANH_COEFFICIENTS, z), x);
    far = 1 − 2 / (exp(2 · a) + 1) with the sign bit of x; result = a < TANH_THRESHOLD ? near : far.
    """
    x = _array(x)
    a = _absolute(x)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        z = x * x
        near = fma(x, z * _polynomial(TANH_COEFFICIENTS, z), x)
        far = np.float32(1) - np.float32(2) / (exp(np.float32(2) * a) + np.float32(1))
    return np.where(a < np.float32(TANH_THRESHOLD), near, _with_sign_of(far, x))


def erf(x: npt.ArrayLike) -> FloatArray:
    """The error function of float32 ``x``, any shape.

    Steps, a = |x|: z = x · x; near = fma(x, Horner(ERF_CENTER_COEFFICIENTS, z), x);
    t = a > ERF_HIGHEST ? ERF_HIGHEST : a; far = 1 − exp(Horner(ERF_TAIL_COEFFICIENTS, t)) with the sign bit of x;
    result = a < ERF_THRESHOLD ? near : far.
    """
    x = _array(x)
    a = _absolute(x)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        z = x * x
        near = fma(x, _polynomial(ERF_CENTER_COEFFICIENTS, z), x)
        t = np.where(a > np.float32(ERF_HIGHEST), np.float32(ERF_HIGHEST), a)
        far = np.float32(1) - exp(_polynomial(ERF_TAIL_COEFFICIENTS, t))
    return np.where(a < np.float32(ERF_THRESHOLD), near, _with_sign_of(far, x))
