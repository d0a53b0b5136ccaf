"""Float constants of C source: no bit may be lost between the module and what a C compiler reads."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import tirx
from tvm.script import ir as I
from tvm.script import tirx as T

from tvm_hquant.passes.exact_float_constants import exact_float_constants


@I.ir_module(s_tir=True)
class Before:
    @T.prim_func(s_tir=True)
    def scale(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")) -> None:
        for i in range(4):
            y[i] = T.max(x[i] * T.float32(1.00000012) + T.float32(0.5), T.float32(float("-inf")))


@I.ir_module(s_tir=True)
class Expected:
    @T.prim_func(s_tir=True)
    def scale(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")) -> None:
        for i in range(4):
            y[i] = T.max(
                x[i]
                * T.call_pure_extern(
                    "float32",
                    "ldexpf",
                    T.call_pure_extern("float32", "fmaf", T.float32(524288), T.float32(1048576), T.float32(65536)),
                    -39,
                )
                + T.float32(0.5),
                T.call_pure_extern("float32", "ldexpf", T.float32(-1), 2000),
            )


def test_constants_of_more_than_seven_digits_become_exact_calls() -> None:
    """0.5 is printed exactly and stays; the others are put together from integers that are printed exactly."""
    tvm.ir.assert_structural_equal(exact_float_constants()(Before), Expected)


def test_module_of_the_caller_is_left_alone() -> None:
    """A pass returns a new module."""
    given_module = Before.clone()
    exact_float_constants()(given_module)
    tvm.ir.assert_structural_equal(given_module, Before)


@settings(deadline=None)
@given(
    st.one_of(
        st.floats(width=32).map(np.float32),
        st.floats(allow_nan=False).map(np.float64),
        st.sampled_from([np.float32(1e-45), np.float32(-3.4028235e38), np.float64(5e-324), np.float64(0.1)]),
    )
)
def test_what_is_printed_is_the_constant(value: np.float32 | np.float64) -> None:
    """Printed with seven digits as TVM prints floats, and computed as C does, the expression is the constant, to the bit."""
    constant = tirx.Evaluate(tirx.FloatImm(str(value.dtype), float(value)))
    stored = exact_float_constants()(tvm.IRModule({"constant": tirx.PrimFunc([], constant)}))["constant"].body.value
    computed = _compute(stored, value.dtype.type)
    assert computed.tobytes() == value.tobytes() or (math.isnan(computed) and math.isnan(value))


def _compute(expression: Any, kind: type) -> Any:
    """The value of an expression in C, whose float constants are printed with seven digits."""
    if not hasattr(expression, "args"):
        return kind(f"{expression.value:.6e}") if isinstance(expression.value, float) else int(expression.value)
    name, *arguments = (getattr(a, "value", a) if i == 0 else _compute(a, kind) for i, a in enumerate(expression.args))
    if re.fullmatch("fmaf?", name):
        return kind(int(arguments[0]) * int(arguments[1]) + int(arguments[2]))
    with np.errstate(over="ignore"):
        return kind(np.ldexp(arguments[0], arguments[1]))
