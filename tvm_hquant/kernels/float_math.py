"""The functions of ``float_polynomials`` and of ``numerics.functions`` as TIR expressions: step by step the same, or with fewer
steps that give the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tvm.tirx.script import builder as T

from tvm_hquant import float_polynomials as polynomials
from tvm_hquant.kernels.primitives import (
    Expression,
    Primitives,
    broadcast,
    clamp,
    convert,
    float_like,
    int_like,
    is_nan,
    lanes_of,
    reinterpret,
    select,
)
from tvm_hquant.numerics.functions import GELU_CUBIC, ONE_SIXTH, SQRT_HALF, SQRT_TWO_OVER_PI, check_function
from tvm_hquant.operators import Composition, Step

_INFINITY = float("inf")
_INFINITY_BITS = 0x7F800000
_MANTISSA_UNITS = 2**23
_NOTHING_BESIDE_ONE = -64.0
"""e to the power of this, or of less, changes nothing when it is added to 1: not half of the last bit."""
_BEYOND_FLOATS = 89.0
"""e to the power of this, or of more, is infinite."""


def _polynomial(p: Primitives, coefficients: Sequence[float], x: Expression) -> Expression:
    value = float_like(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        value = p.fma(value, x, float_like(coefficient, x))
    return value


def _power_of_two(exponent: Expression) -> Expression:
    return reinterpret((exponent + int_like(127, exponent)) << int_like(23, exponent), "float32")


def _absolute(x: Expression) -> Expression:
    return reinterpret(reinterpret(x, "int32") & int_like(~polynomials.SIGN_MASK, x), "float32")


def _with_sign_of(magnitude: Expression, sign: Expression) -> Expression:
    sign_bit = reinterpret(sign, "int32") & int_like(polynomials.SIGN_MASK, sign)
    return reinterpret(reinterpret(magnitude, "int32") | sign_bit, "float32")


def _exp_parts(p: Primitives, t: Expression) -> tuple[Expression, Expression]:
    """Value and k, an int32, with value·2^k = exp(t) for t within the limits of :func:`exp`."""
    n = p.bind(p.round(p.multiply(t, float_like(polynomials.LOG2_E, t))))
    r = p.fma(n, float_like(-polynomials.LN2_HIGH, t), t)
    r = p.bind(p.fma(n, float_like(-polynomials.LN2_LOW, t), r))
    return _polynomial(p, polynomials.EXP_COEFFICIENTS, r), p.bind(convert(n, "int32"))


def exp(p: Primitives, x: Expression) -> Expression:
    """``float_polynomials.exp``."""
    x = p.bind(x)
    low, high = float_like(polynomials.EXP_LOWEST, x), float_like(polynomials.EXP_HIGHEST, x)
    t = p.bind(select(x > low, x, low))
    t = p.bind(select(t < high, t, high))
    value, k = _exp_parts(p, t)
    half = p.bind(k >> int_like(1, x))
    value = p.multiply(p.multiply(value, _power_of_two(half)), _power_of_two(k - half))
    return p.bind(select(is_nan(x), x, value))


def _exp_beside_one(p: Primitives, x: Expression) -> Expression:
    """What gives the bits of :func:`exp` once it is added to 1 or subtracted from it, in half the instructions around the
    polynomial, and without denormals, which are slow. For a NaN it is any number."""
    low, high = float_like(_NOTHING_BESIDE_ONE, x), float_like(_BEYOND_FLOATS, x)
    x = p.bind(x)
    t = p.bind(select(x > low, x, low))
    value, k = _exp_parts(p, p.bind(select(t < high, t, high)))
    # Within the limits, a larger exponent overflows to the bits of infinity or a little above.
    bits = p.bind(reinterpret(value, "int32") + k * int_like(_MANTISSA_UNITS, x))
    infinity = int_like(_INFINITY_BITS, x)
    return p.bind(reinterpret(select(bits < infinity, bits, infinity), "float32"))


def _log_of_parts(p: Primitives, f: Expression, n: Expression) -> Expression:
    """log((1 + f)·2^n)."""
    r = p.fma(p.multiply(f, f), _polynomial(p, polynomials.LOG_COEFFICIENTS, f), f)
    r = p.fma(n, float_like(polynomials.LN2_LOW, f), r)
    return p.fma(n, float_like(polynomials.LN2_HIGH, f), r)


def log(p: Primitives, x: Expression) -> Expression:
    """``float_polynomials.log``."""
    x = p.bind(x)
    small = x < float_like(polynomials.SMALLEST_NORMAL, x)
    y = select(small, p.multiply(x, float_like(polynomials.DENORMAL_SCALE, x)), x)
    b = p.bind(reinterpret(y, "int32") + int_like(polynomials.ONE_BITS - polynomials.SQRT_HALF_BITS, x))
    shift = select(small, int_like(polynomials.DENORMAL_SCALE_EXPONENT, x), int_like(0, x))
    n = p.bind(convert((b >> int_like(23, x)) - int_like(127, x) - shift, "float32"))
    mantissa = (b & int_like(polynomials.MANTISSA_MASK, x)) + int_like(polynomials.SQRT_HALF_BITS, x)
    f = p.bind(p.subtract(reinterpret(mantissa, "float32"), float_like(1.0, x)))
    r = _log_of_parts(p, f, n)
    r = select(x < float_like(_INFINITY, x), r, x)
    zero = float_like(0.0, x)
    # From its bits: TVM's C generator writes the number as ``nan``, which C takes for the function of that name.
    not_a_number = reinterpret(p.bind(int_like(polynomials.NAN_BITS, x)), "float32")
    r = select(x < zero, not_a_number, r)
    return p.bind(select(x.equal(zero), float_like(-_INFINITY, x), r))


def power(p: Primitives, base: Expression, exponent: float) -> Expression:
    """``float_polynomials.power`` with a constant exponent (a float32 value)."""
    return exp(p, p.multiply(float_like(exponent, base), log(p, base)))


def power_of_bounded(p: Primitives, base: Expression, exponent: float, lowest: float) -> Expression:
    """:func:`power`, the same bits with a third of the instructions less, for bases of at least ``lowest``, ∞ and NaN.

    Where ``lowest`` is normal and all results of finite bases are, whatever the functions do for denormals, zero, negative
    values and overflow cannot happen, and what ∞ and NaN give is put in at the end. Elsewhere this is :func:`power`.
    """
    with np.errstate(all="ignore"):
        ends = polynomials.power(np.array([lowest, np.finfo(np.float32).max], np.float32), np.float32(exponent))
        of_infinity = float(polynomials.power(np.float32(np.inf), np.float32(exponent)))
    if lowest < polynomials.SMALLEST_NORMAL or not np.all((ends > 2.0**-120) & (ends < 2.0**120)):
        return power(p, base, exponent)
    base = p.bind(base)
    b = p.bind(reinterpret(base, "int32") + int_like(polynomials.ONE_BITS - polynomials.SQRT_HALF_BITS, base))
    n = p.bind(convert((b >> int_like(23, base)) - int_like(127, base), "float32"))
    mantissa = (b & int_like(polynomials.MANTISSA_MASK, base)) + int_like(polynomials.SQRT_HALF_BITS, base)
    f = p.bind(p.subtract(reinterpret(mantissa, "float32"), float_like(1.0, base)))
    value, k = _exp_parts(p, p.bind(p.multiply(float_like(exponent, base), _log_of_parts(p, f, n))))
    finite = p.multiply(value, _power_of_two(k))
    other = select(is_nan(base), base, float_like(of_infinity, base))
    return p.bind(select(base < float_like(_INFINITY, base), finite, other))


def _logistic(p: Primitives, x: Expression) -> Expression:
    """:func:`sigmoid` of numbers and infinities; for a NaN it is any number."""
    one = float_like(1.0, x)
    # Multiplying by −1 is an exact negation, −0 included; 0 − x would make +0 of +0.
    return p.bind(p.divide(one, p.add(one, _exp_beside_one(p, x * float_like(-1.0, x)))))


def sigmoid(p: Primitives, x: Expression) -> Expression:
    """``float_polynomials.sigmoid``."""
    x = p.bind(x)
    return p.bind(select(is_nan(x), x, _logistic(p, x)))


def tanh(p: Primitives, x: Expression) -> Expression:
    """``float_polynomials.tanh``."""
    x = p.bind(x)
    a = p.bind(_absolute(x))
    z = p.bind(p.multiply(x, x))
    near = p.fma(x, p.multiply(z, _polynomial(p, polynomials.TANH_COEFFICIENTS, z)), x)
    one, two = float_like(1.0, x), float_like(2.0, x)
    far = p.subtract(one, p.divide(two, p.add(_exp_beside_one(p, p.multiply(two, a)), one)))
    # A NaN is not far, and passes through the polynomial.
    is_far = a >= float_like(polynomials.TANH_THRESHOLD, x)
    return p.bind(select(is_far, _with_sign_of(far, x), near))


def erf(p: Primitives, x: Expression) -> Expression:
    """``float_polynomials.erf``."""
    x = p.bind(x)
    a = p.bind(_absolute(x))
    z = p.bind(p.multiply(x, x))
    near = p.fma(x, _polynomial(p, polynomials.ERF_CENTER_COEFFICIENTS, z), x)
    highest = float_like(polynomials.ERF_HIGHEST, x)
    t = p.bind(select(a > highest, highest, a))
    tail = _exp_beside_one(p, _polynomial(p, polynomials.ERF_TAIL_COEFFICIENTS, t))
    far = _with_sign_of(p.subtract(float_like(1.0, x), tail), x)
    return p.bind(select(a >= float_like(polynomials.ERF_THRESHOLD, x), far, near))


Parameters = Sequence[Expression]
"""Float32 scalars."""


def _clip(p: Primitives, x: Expression, parameters: Parameters) -> Expression:
    return clamp(p, x, parameters[0], parameters[1])


def _leaky_relu(p: Primitives, x: Expression, parameters: Parameters) -> Expression:
    x = p.bind(x)
    return select(x > float_like(0.0, x), x, p.multiply(x, broadcast(parameters[0], lanes_of(x))))


def _gelu(p: Primitives, x: Expression, _: Parameters) -> Expression:
    x = p.bind(x)
    half = p.multiply(float_like(0.5, x), x)
    return p.multiply(half, p.add(erf(p, p.multiply(x, float_like(SQRT_HALF, x))), float_like(1.0, x)))


def _gelu_tanh(p: Primitives, x: Expression, _: Parameters) -> Expression:
    x = p.bind(x)
    one = float_like(1.0, x)
    cubic = p.multiply(x, p.fma(p.multiply(x, x), float_like(GELU_CUBIC, x), one))
    inner = p.multiply(cubic, float_like(SQRT_TWO_OVER_PI, x))
    return p.multiply(p.multiply(float_like(0.5, x), x), p.add(tanh(p, inner), one))


def _silu(p: Primitives, x: Expression, _: Parameters) -> Expression:
    x = p.bind(x)
    return p.multiply(x, _logistic(p, x))


def _unit_line(p: Primitives, x: Expression, slope: Expression, intercept: Expression) -> Expression:
    lanes = lanes_of(x)
    value = p.fma(x, broadcast(slope, lanes), broadcast(intercept, lanes))
    return clamp(p, value, T.float32(0), T.float32(1))


def _hard_sigmoid(p: Primitives, x: Expression, parameters: Parameters) -> Expression:
    return _unit_line(p, x, parameters[0], parameters[1])


def _hard_swish(p: Primitives, x: Expression, _: Parameters) -> Expression:
    x = p.bind(x)
    return p.multiply(x, _unit_line(p, x, T.float32(ONE_SIXTH), T.float32(0.5)))


def _elu(p: Primitives, x: Expression, parameters: Parameters) -> Expression:
    x = p.bind(x)
    low = p.multiply(broadcast(parameters[0], lanes_of(x)), p.subtract(exp(p, x), float_like(1.0, x)))
    return select(x > float_like(0.0, x), x, low)


def _floor(p: Primitives, x: Expression, _: Parameters) -> Expression:
    x = p.bind(x)
    nearest = p.bind(p.round(x))
    return select(nearest > x, p.subtract(nearest, float_like(1.0, x)), nearest)


def _ceil(p: Primitives, x: Expression, _: Parameters) -> Expression:
    x = p.bind(x)
    nearest = p.bind(p.round(x))
    return select(nearest < x, p.add(nearest, float_like(1.0, x)), nearest)


_UNARY: Mapping[str, Callable[[Primitives, Expression, Parameters], Expression]] = {
    "clip": _clip,
    "leaky_relu": _leaky_relu,
    "sigmoid": lambda p, x, _: sigmoid(p, x),
    "tanh": lambda p, x, _: tanh(p, x),
    "erf": lambda p, x, _: erf(p, x),
    "exp": lambda p, x, _: exp(p, x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": _hard_swish,
    "elu": _elu,
    "abs": lambda p, x, _: _absolute(p.bind(x)),
    "negative": lambda p, x, _: p.multiply(x, float_like(-1.0, x)),
    "round": lambda p, x, _: p.round(x),
    "floor": _floor,
    "ceil": _ceil,
}


def _greater(_: Primitives, a: Expression, b: Expression) -> Expression:
    return select(a > b, float_like(1.0, a), float_like(0.0, a))


_OPERATIONS: Mapping[str, Callable[..., Expression]] = {
    "add": lambda p, a, b: p.add(a, b),
    "subtract": lambda p, a, b: p.subtract(a, b),
    "multiply": lambda p, a, b: p.multiply(a, b),
    "divide": lambda p, a, b: p.divide(a, b),
    "maximum": lambda p, a, b: select(a > b, a, b),
    "minimum": lambda p, a, b: select(a < b, a, b),
    "greater": _greater,
    "where": lambda p, c, a, b: select(c > float_like(0.0, c), a, b),
    "log": log,
}


def unary(p: Primitives, function: str | Composition, x: Expression, parameters: Parameters) -> Expression:
    """``numerics.unary_float32``: a unary function of a float32 ``x``, with scalar parameters.

    Raises:
        KernelError: there is no such function, or the number of parameters is wrong.
    """
    check_function(function, len(parameters))
    if isinstance(function, str):
        return _UNARY[function](p, x, parameters)
    values = [p.bind(x)]
    for step in function.steps:
        values.append(p.bind(_step(p, step, values, parameters)))
    return values[-1]


def _step(p: Primitives, step: Step, values: Sequence[Expression], parameters: Parameters) -> Expression:
    scalars_and_values = [values[i] if i >= 0 else parameters[-1 - i] for i in step.operands]
    if step.function in _UNARY:
        return _UNARY[step.function](p, scalars_and_values[0], scalars_and_values[1:])
    lanes = lanes_of(values[0])
    operands = [broadcast(o, lanes) if i < 0 else o for i, o in zip(step.operands, scalars_and_values, strict=True)]
    return _OPERATIONS[step.function](p, *operands)
