"""Unary functions: tables equal the scalar computation, and the float32 steps stay close to the real functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from exact_arithmetic import float32_array

from tvm_hquant import float_polynomials, numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.operators import Composition, Step
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat

Case = tuple[str, tuple[float, ...], Callable[[float], float]]
CASES: list[Case] = [
    ("clip", (-1.0, 2.0), lambda x: min(max(x, -1.0), 2.0)),
    ("leaky_relu", (0.1,), lambda x: x if x > 0 else 0.1 * x),
    ("sigmoid", (), lambda x: 1 / (1 + math.exp(-x))),
    ("tanh", (), math.tanh),
    ("erf", (), math.erf),
    ("exp", (), math.exp),
    ("gelu", (), lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2))),
    ("gelu_tanh", (), lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ("silu", (), lambda x: x / (1 + math.exp(-x))),
    ("hard_sigmoid", (0.2, 0.5), lambda x: min(max(0.2 * x + 0.5, 0.0), 1.0)),
    ("hard_swish", (), lambda x: x * min(max(x / 6 + 0.5, 0.0), 1.0)),
    ("elu", (1.5,), lambda x: x if x > 0 else 1.5 * math.expm1(x)),
    ("abs", (), abs),
    ("negative", (), lambda x: -x),
    ("round", (), round),
    ("floor", (), math.floor),
    ("ceil", (), math.ceil),
]
INPUTS = [TensorFormat("uint8", 0.0625, 100, 0, 255), TensorFormat("int8", 0.0625, 0, -128, 127)]
OUTPUTS = [
    TensorFormat("uint8", 0.03125, 60, 0, 255),
    TensorFormat("int8", 0.0625, 0, -128, 127),
    TensorFormat("uint16", 0.001953125, 3000, 0, 65535),
    FLOAT32_FORMAT,
]


def test_every_function_is_covered() -> None:
    """A function added to the product without a case here would go untested."""
    assert {name for name, _, _ in CASES} == set(numerics.PARAMETER_COUNTS)


@pytest.mark.parametrize(("name", "parameters", "function"), CASES, ids=[case[0] for case in CASES])
def test_tables_equal_scalar_computation(
    name: str, parameters: tuple[float, ...], function: Callable[[float], float]
) -> None:
    """Each of the 256 entries, for canonical and shifted storage of inputs and outputs."""
    for source in INPUTS:
        for target in OUTPUTS:
            table = numerics.unary_table(name, parameters, source, target)
            assert table.shape == (256,)
            for stored in range(256):
                value = function(source.scale * (stored - source.storage_zero_point))
                if target.is_integer:
                    code = round(value / target.scale) + target.zero_point
                    expected = min(max(code, target.q_min), target.q_max) + target.storage_offset
                    near_tie = abs(abs(value / target.scale % 1) - 0.5) < 1e-9
                    assert table[stored] == expected or (near_tie and abs(int(table[stored]) - expected) <= 1)
                else:
                    assert table[stored] == pytest.approx(value, rel=1e-6, abs=1e-12)


def test_table_of_narrow_codes_is_defined_everywhere() -> None:
    """4-bit codes are stored in bytes: entries that no code reaches repeat the nearest one."""
    table = numerics.unary_table("clip", (0.0, 100.0), TensorFormat("uint8", 1.0, 3, 0, 15), FLOAT32_FORMAT)
    np.testing.assert_array_equal(table[[0, 3, 15, 16, 255]], float32_array([0, 0, 12, 12, 12]))


@pytest.mark.parametrize(("name", "parameters", "function"), CASES, ids=[case[0] for case in CASES])
def test_float32_steps_are_close_to_the_function(
    name: str, parameters: tuple[float, ...], function: Callable[[float], float]
) -> None:
    """float32 and float64 forms are written separately and must both be the function."""
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    exact = np.array([function(float(v)) for v in x])
    ours = numerics.unary_float32(name, parameters, x)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, exact, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(
        numerics.unary_float64(name, parameters, x.astype(np.float64)), exact, rtol=1e-12, atol=1e-14
    )


def test_unknown_functions_and_missing_parameters() -> None:
    """A wrong request names what there is instead of failing somewhere below."""
    with pytest.raises(KernelError, match=r"no unary function 'swish'.*silu"):
        numerics.unary_float32("swish", (), np.zeros(1, np.float32))
    with pytest.raises(KernelError, match="'clip' has 2 parameters"):
        numerics.unary_float64("clip", (1.0,), np.zeros(1))
    with pytest.raises(KernelError, match="256 entries"):
        numerics.unary_table("tanh", (), TensorFormat("uint16", 1.0, 0, 0, 65535), FLOAT32_FORMAT)


MISH = Composition(
    (
        Step("exp", (0,)),
        Step("add", (-1, 1)),
        Step("log", (2,)),
        Step("tanh", (3,)),
        Step("multiply", (0, 4)),
        Step("clip", (5, -2, -3)),
    )
)
"""min(x · tanh(log(1 + exp(x))), 3)"""


def test_a_composition_takes_its_steps_one_by_one() -> None:
    """Float32 rounds after each step, a table is made in float64: both are the function."""
    parameters = (1.0, -math.inf, 3.0)
    x = np.linspace(-12, 12, 401).astype(np.float32)
    exact = np.minimum(x * np.tanh(np.logaddexp(x.astype(np.float64), 0)), 3)
    np.testing.assert_allclose(numerics.unary_float32(MISH, parameters, x), exact, rtol=3e-6, atol=1e-6)
    steps = [float_polynomials.exp(x)]
    steps.append(float_polynomials.log(np.float32(1) + steps[0]))
    by_hand = np.minimum(x * float_polynomials.tanh(steps[1]), np.float32(3))
    np.testing.assert_array_equal(numerics.unary_float32(MISH, parameters, x), by_hand)
    source, target = INPUTS[0], OUTPUTS[0]
    real = source.scale * (np.arange(256) - source.zero_point)
    codes = np.rint(np.minimum(real * np.tanh(np.logaddexp(real, 0)), 3) / target.scale) + target.zero_point
    np.testing.assert_array_equal(numerics.unary_table(MISH, parameters, source, target), np.clip(codes, 0, 255))


def test_compositions_that_cannot_be_computed() -> None:
    """Steps name operations that there are, with their operands, and take only what is there."""
    x = np.zeros(1, np.float32)
    for step, message in (
        (Step("sinh", (0,)), "no operation 'sinh'.*log"),
        (Step("add", (0,)), "'add' takes 2 operands"),
        (Step("add", (0, 1)), "takes values"),
        (Step("add", (0, -1)), "takes values"),
    ):
        with pytest.raises(KernelError, match=message):
            numerics.unary_float32(Composition((step,)), (), x)


def test_clamp_gives_the_lower_bound_for_nan() -> None:
    """v > L ? v : L is what one comparison and one select do on every machine."""
    np.testing.assert_array_equal(
        numerics.clamp(float32_array([np.nan, -9, 9, 1]), -1.0, 2.0), float32_array([-1, -1, 2, 1])
    )
