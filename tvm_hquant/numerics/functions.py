"""Unary functions: in float32, step by step as kernels repeat them, and in float64, from which tables are made.

Float32 steps (each · + − / is rounded alone; ``clamp(v, L, H)`` is v = v > L ? v : L, then v < H ? v : H):

================  ==============  ===================================================================================
function          parameters      steps
================  ==============  ===================================================================================
``clip``          lower, upper    clamp(x, lower, upper)
``leaky_relu``    alpha           x > 0 ? x : x · alpha
``sigmoid``                       :func:`tvm_hquant.float_polynomials.sigmoid`
``tanh``                          :func:`tvm_hquant.float_polynomials.tanh`
``erf``                           :func:`tvm_hquant.float_polynomials.erf`
``exp``                           :func:`tvm_hquant.float_polynomials.exp`
``gelu``                          (0.5 · x) · (erf(x · √½) + 1)
``gelu_tanh``                     z = x · x; t = tanh((x · fma(z, 0.044715, 1)) · √(2/π)); (0.5 · x) · (t + 1)
``silu``                          x · sigmoid(x)
``hard_sigmoid``  alpha, beta     clamp(fma(x, alpha, beta), 0, 1)
``hard_swish``                    x · clamp(fma(x, float32(1/6), 0.5), 0, 1)
``elu``           alpha           x > 0 ? x : alpha · (exp(x) − 1)
``abs``                           x without its sign bit
``negative``                      x · −1
``round``                         the nearest integer, ties to even
``floor``                         r = round(x); r > x ? r − 1 : r
``ceil``                          r = round(x); r < x ? r + 1 : r
================  ==============  ===================================================================================

A :class:`~tvm_hquant.operators.Composition` takes these one after the other, each result rounded to float32, and also:

================  ==============  ===================================================================================
operation         operands        result
================  ==============  ===================================================================================
``add``           a, b            a + b; likewise ``subtract``, ``multiply`` and ``divide``
``maximum``       a, b            a > b ? a : b
``minimum``       a, b            a < b ? a : b
``greater``       a, b            a > b ? 1 : 0
``where``         c, a, b         c > 0 ? a : b
``log``           a               :func:`tvm_hquant.float_polynomials.log`
================  ==============  ===================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import special

from tvm_hquant import float_polynomials as polynomials
from tvm_hquant.errors import KernelError
from tvm_hquant.fused_multiply_add import DoubleArray, FloatArray, fma
from tvm_hquant.numerics.codes import stored_codes
from tvm_hquant.numerics.storage import narrow
from tvm_hquant.operators import Composition
from tvm_hquant.tensor_format import TensorFormat

SQRT_HALF: Final = float(np.float32(math.sqrt(0.5)))
SQRT_TWO_OVER_PI: Final = float(np.float32(math.sqrt(2 / math.pi)))
GELU_CUBIC: Final = float(np.float32(0.044715))
ONE_SIXTH: Final = float(np.float32(1 / 6))

Parameters = tuple[float, ...]


def clamp(x: FloatArray, lower: float, upper: float) -> FloatArray:
    """x = x > lower ? x : lower; x = x < upper ? x : upper, in float32. A NaN gives ``lower``."""
    low, high = np.float32(lower), np.float32(upper)
    x = np.where(x > low, x, low)
    return np.where(x < high, x, high)


def _leaky_relu(x: FloatArray, p: Parameters) -> FloatArray:
    return np.where(x > 0, x, x * np.float32(p[0]))


def _gelu(x: FloatArray, _: Parameters) -> FloatArray:
    return (np.float32(0.5) * x) * (polynomials.erf(x * np.float32(SQRT_HALF)) + np.float32(1))


def _gelu_tanh(x: FloatArray, _: Parameters) -> FloatArray:
    inner = (x * fma(x * x, np.float32(GELU_CUBIC), np.float32(1))) * np.float32(SQRT_TWO_OVER_PI)
    return (np.float32(0.5) * x) * (polynomials.tanh(inner) + np.float32(1))


def _hard_sigmoid(x: FloatArray, p: Parameters) -> FloatArray:
    return clamp(fma(x, np.float32(p[0]), np.float32(p[1])), 0.0, 1.0)


def _elu(x: FloatArray, p: Parameters) -> FloatArray:
    return np.where(x > 0, x, np.float32(p[0]) * (polynomials.exp(x) - np.float32(1)))


def _floor(x: FloatArray, _: Parameters) -> FloatArray:
    nearest = np.rint(x)
    return np.where(nearest > x, nearest - np.float32(1), nearest)


def _ceil(x: FloatArray, _: Parameters) -> FloatArray:
    nearest = np.rint(x)
    return np.where(nearest < x, nearest + np.float32(1), nearest)


_FLOAT32: Mapping[str, Callable[[FloatArray, Parameters], FloatArray]] = {
    "clip": lambda x, p: clamp(x, p[0], p[1]),
    "leaky_relu": _leaky_relu,
    "sigmoid": lambda x, _: polynomials.sigmoid(x),
    "tanh": lambda x, _: polynomials.tanh(x),
    "erf": lambda x, _: polynomials.erf(x),
    "exp": lambda x, _: polynomials.exp(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": lambda x, _: x * polynomials.sigmoid(x),
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda x, _: x * _hard_sigmoid(x, (ONE_SIXTH, 0.5)),
    "elu": _elu,
    "abs": lambda x, _: np.abs(x),
    "negative": lambda x, _: np.negative(x),
    "round": lambda x, _: np.rint(x),
    "floor": _floor,
    "ceil": _ceil,
}

_FLOAT64: Mapping[str, Callable[[DoubleArray, Parameters], DoubleArray]] = {
    "clip": lambda x, p: np.clip(x, p[0], p[1]),
    "leaky_relu": lambda x, p: np.where(x > 0, x, x * p[0]),
    "sigmoid": lambda x, _: _double(special.expit(x)),
    "tanh": lambda x, _: np.tanh(x),
    "erf": lambda x, _: _double(special.erf(x)),
    "exp": lambda x, _: np.exp(x),
    "gelu": lambda x, _: x * _double(special.ndtr(x)),
    "gelu_tanh": lambda x, _: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x, _: x * _double(special.expit(x)),
    "hard_sigmoid": lambda x, p: np.clip(x * p[0] + p[1], 0.0, 1.0),
    "hard_swish": lambda x, _: x * np.clip(x / 6 + 0.5, 0.0, 1.0),
    "elu": lambda x, p: np.where(x > 0, x, p[0] * np.expm1(np.minimum(x, 0.0))),
    "abs": lambda x, _: np.abs(x),
    "negative": lambda x, _: np.negative(x),
    "round": lambda x, _: np.rint(x),
    "floor": lambda x, _: np.floor(x),
    "ceil": lambda x, _: np.ceil(x),
}

PARAMETER_COUNTS: Final[Mapping[str, int]] = {
    name: {"clip": 2, "leaky_relu": 1, "hard_sigmoid": 2, "elu": 1}.get(name, 0) for name in _FLOAT32
}
"""Every unary function there is, with the number of its parameters."""


_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": lambda a, b: np.where(a > b, a, b),
    "minimum": lambda a, b: np.where(a < b, a, b),
    "greater": lambda a, b: (a > b).astype(np.result_type(a, b)),
    "where": lambda c, a, b: np.where(c > 0, a, b),
}
_LOGARITHM: Mapping[type[Any], Callable[[Any], Any]] = {np.float32: polynomials.log, np.float64: np.log}
_OPERAND_COUNTS: Mapping[str, int] = {
    **{name: 1 + count for name, count in PARAMETER_COUNTS.items()},
    **{name: 3 if name == "where" else 2 for name in _OPERATIONS},
    "log": 1,
}


def _double(x: Any) -> DoubleArray:
    return np.asarray(x, np.float64)


def check_function(function: str | Composition, parameters: int) -> None:
    """Raises:
    KernelError: there is no such function, it has another number of parameters, or a step takes what is not there.
    """
    if isinstance(function, str):
        if function not in PARAMETER_COUNTS:
            raise KernelError(f"no unary function {function!r}: use one of {', '.join(PARAMETER_COUNTS)}")
        if parameters != PARAMETER_COUNTS[function]:
            raise KernelError(
                f"unary function {function!r} has {PARAMETER_COUNTS[function]} parameters, {parameters} were given"
            )
        return
    for number, step in enumerate(function.steps):
        if step.function not in _OPERAND_COUNTS:
            raise KernelError(f"no operation {step.function!r}: use one of {', '.join(_OPERAND_COUNTS)}")
        if len(step.operands) != _OPERAND_COUNTS[step.function]:
            raise KernelError(
                f"{step.function!r} takes {_OPERAND_COUNTS[step.function]} operands, {len(step.operands)} were given"
            )
        if not all(-parameters <= operand <= number for operand in step.operands):
            raise KernelError(f"step {number + 1} of {function} takes values that no step before it gives")


def _evaluate(function: str | Composition, parameters: Parameters, x: Any, functions: Mapping[str, Any]) -> Any:
    check_function(function, len(parameters))
    if isinstance(function, str):
        return functions[function](x, parameters)
    values = [x]
    for step in function.steps:
        operands = [values[i] if i >= 0 else x.dtype.type(parameters[-1 - i]) for i in step.operands]
        if step.function in functions:
            values.append(functions[step.function](operands[0], tuple(float(o) for o in operands[1:])))
        elif step.function == "log":
            values.append(_LOGARITHM[x.dtype.type](operands[0]))
        else:
            values.append(_OPERATIONS[step.function](*operands))
    return values[-1]


def unary_float32(function: str | Composition, parameters: Parameters, x: FloatArray) -> FloatArray:
    """``function`` of float32 ``x`` in the steps listed above; parameters are rounded to float32 first.

    Raises:
        KernelError: there is no such function, or the number of parameters is wrong.
    """
    with np.errstate(all="ignore"):
        return np.asarray(_evaluate(function, parameters, np.asarray(x, np.float32), _FLOAT32), np.float32)


def unary_float64(function: str | Composition, parameters: Parameters, x: DoubleArray) -> DoubleArray:
    """``function`` of float64 ``x``, as exact as float64 is.

    Raises:
        KernelError: there is no such function, or the number of parameters is wrong.
    """
    with np.errstate(all="ignore"):
        return np.asarray(_evaluate(function, parameters, np.asarray(x, np.float64), _FLOAT64), np.float64)


def unary_table(
    function: str | Composition, parameters: Parameters, input_format: TensorFormat, output_format: TensorFormat
) -> npt.NDArray[Any]:
    """The function as a table over the 256 *stored* codes of an 8-bit input.

    Entry i is f(s_x · (i − stored zp_x)) in float64; for codes as output, divided by s_y, rounded to even, zp_y
    added, clamped to the codes, and stored. Stored codes outside the input's limits count as the nearest limit.

    Returns:
        [256] of the dtype of the output's storage (bfloat16 as uint16 bit patterns).

    Raises:
        KernelError: the function is unknown or lacks parameters, or the input is not of 8 bits.
    """
    if input_format.storage != "uint8":
        raise KernelError(f"a table has 256 entries, but the input of {function!r} is {input_format.dtype}: use uint8")
    offset = input_format.storage_offset
    codes = np.clip(np.arange(256) - offset, input_format.q_min, input_format.q_max)
    values = unary_float64(
        function, parameters, input_format.scale * (codes - input_format.zero_point).astype(np.float64)
    )
    if not output_format.is_integer:
        return narrow(values.astype(np.float32), output_format.storage)
    scaled = np.rint(values / output_format.scale) + output_format.zero_point
    clamped = np.where(scaled > output_format.q_min, np.minimum(scaled, output_format.q_max), output_format.q_min)
    return stored_codes(clamped.astype(np.int32), output_format)
