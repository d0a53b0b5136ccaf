"""The bound of tensor cores: protects that no way in which they are known to add breaks it, and that it says something."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.interface import FloatAnchorConstants, KernelRequest, NoConstants
from tvm_hquant.numerics.tensor_cores import STEP, sum_limits
from tvm_hquant.operators import Conv2D, Dense, Epilogue, Window

Array = npt.NDArray[Any]
SMALLEST = {"float16": -14, "bfloat16": -126}


def cut(value: float, exponent: int) -> float:
    """Without what lies below 2 to the exponent."""
    return math.ldexp(math.trunc(math.ldexp(value, -exponent)), exponent)


def exponent(value: float, smallest: int) -> int:
    """Of a number as hardware holds it: denormal numbers and zeros have the smallest."""
    return max(math.frexp(value)[1] - 1, smallest) if value else smallest


def to_float32(value: float) -> float:
    """Cut off to a float32."""
    return cut(value, max(exponent(value, -126), -126) - 23)


def added(total: float, products: list[tuple[float, float]], fraction: int, smallest: int, in_one: bool) -> float:
    """The sum with a block of products: with all of them in one alignment, or with their own sum."""
    if not in_one:
        block = added(0.0, products, fraction, smallest, True)
        return added_numbers([total, block], [exponent(total, -126), exponent(block, -126)], fraction)
    exponents = [exponent(a, smallest) + exponent(b, smallest) for a, b in products]
    return added_numbers([total, *(a * b for a, b in products)], [exponent(total, -126), *exponents], fraction)


def added_numbers(numbers: list[float], exponents: list[int], fraction: int) -> float:
    return to_float32(sum(cut(n, max(exponents) - fraction) for n in numbers))


@st.composite
def operands(draw: st.DrawFn, storage: str) -> tuple[Array, Array, Array]:
    """Activations, weights and a bias, of many magnitudes, with zeros, denormal numbers and cancellation."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    depth, spread = draw(st.integers(1, 40)), draw(st.sampled_from([0, 3, 8, 14]))
    values = random.normal(size=(2, depth)) * 2.0 ** random.integers(-spread, spread + 1, (2, depth))
    values *= 2.0 ** np.array([[draw(st.sampled_from([0, -6, -18]))], [draw(st.sampled_from([0, -6, -18]))]])
    values[random.random((2, depth)) < draw(st.sampled_from([0.0, 0.5]))] = 0
    bias = np.float32(random.normal() * 2.0 ** draw(st.sampled_from([-30, 0, 10])))
    x, w = (numerics.narrow(v.astype(np.float32), storage) for v in values)
    if draw(st.booleans()):  # what cancels but for little
        x, w = np.concatenate([x, x]), np.concatenate([w, numerics.narrow(-numerics.widen(w, storage), storage)])
        order = random.permutation(len(x))
        x, w = x[order], w[order]
    return x, w, np.array([bias])


def dense(storage: str, depth: int) -> KernelRequest:
    return KernelRequest(Dense(1, depth, 1, Epilogue(has_bias=True)), (storage,), "float32", storage)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_known_way_to_add_is_within_the_limits(data: st.DataObject) -> None:
    """Blocks of 4, 8 and 16, 0 to 2 bits behind the float's, blocks added at once or apart, in any order within a step."""
    storage = data.draw(st.sampled_from(["float16", "bfloat16"]))
    x, w, bias = data.draw(operands(storage))
    block, fraction = data.draw(st.sampled_from([4, 8, 16])), data.draw(st.sampled_from([23, 24, 25]))
    step, in_one = data.draw(st.sampled_from([s for s in (8, 16) if s >= block])), data.draw(st.booleans())
    padded = -(-len(x) // step) * step
    pairs = [*zip(numerics.widen(x, storage).tolist(), numerics.widen(w, storage).tolist(), strict=True)]
    pairs += [(0.0, 0.0)] * (padded - len(pairs))
    total = float(bias[0])
    for first in range(0, padded, step):
        taken = data.draw(st.permutations(pairs[first : first + step]))
        for begin in range(0, step, block):
            total = added(total, taken[begin : begin + block], fraction, SMALLEST[storage], in_one)
    constants = FloatAnchorConstants(w.reshape(1, -1, 1, 1), bias, -math.inf, math.inf)
    limits = numerics.tensor_core_limits(dense(storage, len(x)), constants, [x.reshape(1, -1)])
    assert limits.lower <= total <= limits.upper
    contract = numerics.evaluate(dense(storage, len(x)), constants, [x.reshape(1, -1)])
    assert limits.lower <= contract <= limits.upper


CONV = Conv2D((1, 6, 5, 40), 12, Window((3, 3), (1, 2), (1, 1, 0, 1)), 2, Epilogue(True, True, -1.0, 1.0))


def conv_case(storage: str, output: str) -> tuple[KernelRequest, FloatAnchorConstants, list[Array]]:
    random = np.random.default_rng(3)

    def normal(shape: tuple[int, ...]) -> Array:
        return numerics.narrow(random.normal(size=shape).astype(np.float32), storage)

    bias = random.normal(size=12).astype(np.float32)
    constants = FloatAnchorConstants(normal(CONV.weight_shape), bias, CONV.epilogue.lower, CONV.epilogue.upper)
    inputs = [normal(CONV.input_shape), normal(CONV.output_shape)]
    return KernelRequest(CONV, (storage, storage), output, storage), constants, inputs


@pytest.mark.parametrize(("storage", "output"), [("float16", "float16"), ("bfloat16", "float32")])
def test_limits_hold_the_contract_and_little_else(storage: str, output: str) -> None:
    """Padding, groups, a residual and a clamp: the contract's values lie within, those without one product mostly do not."""
    request, constants, inputs = conv_case(storage, output)
    limits = numerics.tensor_core_limits(request, constants, inputs)
    assert limits.lower.dtype == numerics.evaluate(request, constants, inputs).dtype
    exact = numerics.evaluate(request, constants, inputs)
    assert numerics.beyond_limits(exact, limits, output) == (0, 0.0)
    weights = constants.weights.copy()
    weights[:, 7, 1, 1] = 0
    wrong = numerics.evaluate(request, replace(constants, weights=weights), inputs)
    different = np.flatnonzero(wrong != exact)
    count, distance = numerics.beyond_limits(wrong, limits, output)
    assert count > 0.8 * len(different)
    assert 0 < distance < 10
    assert numerics.beyond_limits(exact[..., :-1], limits, output)[1] == math.inf


def test_the_stated_bound() -> None:
    """What ``docs/numerics.md`` says in one formula holds for the step-by-step one."""
    _, constants, inputs = conv_case("float16", "float32")
    x, w = numerics.widen(inputs[0], "float16"), numerics.widen(constants.weights, "float16")
    start = np.asarray(constants.bias)
    _, errors = sum_limits(CONV, x, w, start, 2.0**-14)
    magnitudes, _ = sum_limits(CONV, np.maximum(abs(x), 2.0**-14), np.maximum(abs(w), 2.0**-14), abs(start), 2.0**-14)
    # Padding is zero here and has the smallest magnitude there.
    magnitudes += 9 * 20 * 2.0**-14 * np.abs(w).max()
    steps = 9 * -(-20 // STEP)
    assert (errors > 0).all()
    assert (errors <= steps * 24 * 2.0**-23 * 1.001 * magnitudes).all()


def test_infinities_stay_what_they_are() -> None:
    """Where an operand is no number the limits are one value: infinite or NaN, which every order of sums gives."""
    x = np.array([[np.inf, 1, 2], [np.inf, 1, -np.inf], [1, 2, 3]], np.float16)
    w = np.ones((1, 3, 1, 1), np.float16)
    constants = FloatAnchorConstants(w, np.zeros(1, np.float32), -math.inf, math.inf)
    request = KernelRequest(Dense(3, 3, 1), ("float16",), "float32", "float16")
    limits = numerics.tensor_core_limits(request, constants, [x])
    exact = numerics.evaluate(request, constants, [x])
    assert exact[0] == np.inf
    assert numerics.beyond_limits(exact, limits, "float32") == (0, 0.0)
    assert numerics.beyond_limits(np.array([[3.0], exact[1], exact[2]], np.float32), limits, "float32")[0] == 1


def test_other_layers_are_refused() -> None:
    """Codes and float32 have no such unit."""
    constants = FloatAnchorConstants(np.ones((1, 1, 1, 1), np.float32), np.zeros(1, np.float32), -1, 1)
    request = KernelRequest(Dense(1, 1, 1), ("float32",), "float32", "float32")
    with pytest.raises(KernelError, match="no layer of 16-bit floats"):
        numerics.tensor_core_limits(request, constants, [np.ones((1, 1), np.float32)])
    with pytest.raises(KernelError, match="no layer of 16-bit floats"):
        numerics.tensor_core_limits(replace(request, inputs=("float16",)), NoConstants(), [np.ones((1, 1), np.float16)])
