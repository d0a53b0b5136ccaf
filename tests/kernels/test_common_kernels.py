"""Kernels without weights against the arithmetic contract, bit for bit, in vectors of several widths.

Protects that what is simulated is what runs: odd sizes, tails below and above one vector, every combination of storages
that a plan can make, and the special values of float arithmetic.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL_KINDS,
    COMPOSITION,
    FLOATS,
    Case,
    assert_matches_contract,
    elementwise_constants,
    run_kernel,
    seeds,
    shapes,
    unary_case,
)

from tvm_hquant import numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.interface import (
    FloatElementwiseConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    NoConstants,
    NormalizationConstants,
    QuantizeConstants,
    Requantization,
)
from tvm_hquant.kernels.registry import host_instruction_sets
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.kernels.weightless.movement import interleaved_groups
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    Composition,
    Conv2D,
    Convert,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Opaque,
    Resize2D,
    Softmax,
    Unary,
    Window,
)
from tvm_hquant.relax_ir.describe import resize_positions

LANES = {"avx512_vnni": 16, "avx2": 8}
TARGETS = {
    "avx512_vnni": {"kind": "llvm", "mcpu": "cascadelake"},
    "avx2": {"kind": "llvm", "mcpu": "x86-64-v3"},
}
HOST = host_instruction_sets()
INSTRUCTION_SETS = [
    pytest.param(name, marks=[] if name in HOST else pytest.mark.skip(reason=f"this CPU has no {name}"))
    for name in TARGETS
]
few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def check(case: Case, instruction_set: str) -> None:
    kernel = CommonFamily(LANES[instruction_set]).kernel(case.request)
    assert_matches_contract(kernel, case, TARGETS[instruction_set])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("kind", ALL_KINDS)
@few
@given(data=st.data())
def test_random_layers_match_the_contract(kind: str, instruction_set: str, data: st.DataObject) -> None:
    """Any layer, shape and storage gives the oracle's bits."""
    check(data.draw(ALL_KINDS[kind]), instruction_set)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("function", [*numerics.PARAMETER_COUNTS, COMPOSITION])
@settings(max_examples=2, deadline=None)
@given(shape=shapes, storage=st.sampled_from(FLOATS), seed=seeds)
def test_float_unary_functions_match_the_contract(
    function: str | Composition, instruction_set: str, shape: tuple[int, ...], storage: str, seed: int
) -> None:
    """Every polynomial repeats the oracle's steps, with no step merged by the compiler."""
    check(unary_case(function, shape, storage, storage, seed), instruction_set)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("function", ["sigmoid", "silu", "tanh", "erf", "gelu", "gelu_tanh"])
def test_exponentials_beside_one_match_the_contract(function: str, instruction_set: str) -> None:
    """What is left out of exp where it meets a 1 changes no bit: floats of all exponents, infinities and NaN, and those around
    the places where e to their power, or to twice it, vanishes beside 1, is denormal, or overflows."""
    every = np.arange(0, 2**32, 8209, dtype=np.uint64).astype(np.uint32).view(np.float32)
    places = np.array([16.6, 17.4, 20.8, 64.0, 87.33655, 88.02969, 88.72284, 89.0, 103.97208, 104.0], np.float32)
    near = (places[:, None].view(np.int32) + np.arange(-400, 400, dtype=np.int32)).view(np.float32).reshape(-1)
    x = np.concatenate([every, near, -near, near / 2, -near / 2, np.array([np.nan, np.inf, -np.inf], np.float32)])
    request = KernelRequest(Unary(x.shape, function), ("float32",), "float32")

    class Dense(Case):
        def inputs(self) -> list[np.ndarray]:
            return [x]

    check(Dense(request, FloatElementwiseConstants(()), 0), instruction_set)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("shape", [(1, 23, 29, 64), (1, 40, 40, 13)])
def test_parallel_loops_cover_large_tensors(shape: tuple[int, ...], instruction_set: str) -> None:
    """Tensors that are shared out to threads have no gap and no seam, even if their size fits neither vector nor chunk."""
    none = NoConstants()
    for case in (
        Case(KernelRequest(Convert(shape), ("float32",), "bfloat16"), none, 1),
        Case(KernelRequest(MaxPool2D(shape, Window((3, 3), (1, 1), (1, 1, 1, 1))), ("uint8",), "uint8"), none, 2),
        Case(
            KernelRequest(Movement("permute_dims", shape, (1, *shape[:0:-1]), (0, 3, 2, 1)), ("uint8",), "uint8"),
            none,
            3,
        ),
        unary_case("tanh", shape, "float32", "float32", 4),
    ):
        check(case, instruction_set)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@few
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(2, 6), st.integers(1, 5), st.integers(1, 40)),
    size=st.tuples(st.integers(9, 40), st.integers(1, 13)),
    mode=st.sampled_from(["half_pixel", "asymmetric", "align_corners"]),
    storages=st.sampled_from(
        [("uint8", "uint8"), ("uint16", "float32"), ("float32", "float32"), ("float16", "bfloat16")]
    ),
    seed=seeds,
)
def test_enlarged_maps_match_the_contract(instruction_set, shape, size, mode, storages, seed) -> None:
    """Rows that many rows of the output lie between are resized once: no row is left out, none is taken for another."""
    rows, columns = (resize_positions(mode, shape[axis + 1], size[axis]) for axis in (0, 1))
    assert rows is not None
    assert columns is not None
    request = KernelRequest(Resize2D(shape, size, rows, columns), storages[:1], storages[1])
    is_integer = storages[0].startswith("uint")
    rng = np.random.default_rng(seed)
    check(Case(request, elementwise_constants(request, rng) if is_integer else NoConstants(), seed), instruction_set)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_add_fuses_in_the_order_of_the_inputs(instruction_set: str) -> None:
    """Every pair of codes with multipliers for which a wrong order, or an unfused product, gives other values."""
    codes = np.arange(256, dtype=np.uint8)
    a, b = (np.ascontiguousarray(g) for g in np.meshgrid(codes, codes))
    m = np.float32(0.7310585), np.float32(0.26894143)
    constants = IntegerElementwiseConstants((3, 250), m, Requantization(-1e9, 1e9, 0))
    request = KernelRequest(Add((256, 256)), ("uint8", "uint8"), "float32")

    class Pairs(Case):
        def inputs(self) -> list[np.ndarray]:
            return [a, b]

    got = run_kernel(
        CommonFamily(LANES[instruction_set]).kernel(request), Pairs(request, constants, 0), TARGETS[instruction_set]
    )
    x, y = (g.astype(np.float32) - np.float32(zp) for g, zp in ((a, 3), (b, 250)))
    np.testing.assert_array_equal(got, numerics.fma(y, m[1], x * m[0]))
    assert (got != numerics.fma(x, m[0], y * m[1])).any()
    assert (got != x * m[0] + y * m[1]).any()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_quantize_divides_and_clamps_before_converting(instruction_set: str) -> None:
    """x / s is a true division: multiplying by 1 / s would give other codes at ties. Infinities and NaN give the bounds."""
    scale = float(np.float32(0.049))
    x = (np.float32(scale) * (np.arange(-2000, 2000) + np.float32(0.5))).astype(np.float32)
    x = np.concatenate([x, np.array([np.inf, -np.inf, np.nan, 1e30, -1e30], np.float32)])
    request = KernelRequest(Convert(x.shape), ("float32",), "uint16")
    constants = QuantizeConstants(scale, Requantization(-1500.0, 60000.0, 2000))

    class Ties(Case):
        def inputs(self) -> list[np.ndarray]:
            return [x]

    kernel = CommonFamily(LANES[instruction_set]).kernel(request)
    assert kernel is not None
    got = run_kernel(kernel, Ties(request, constants, 0), TARGETS[instruction_set])
    np.testing.assert_array_equal(got, numerics.evaluate(request, constants, [x]))
    assert got[-5:].tolist() == [62000, 500, 500, 62000, 500]
    with np.errstate(over="ignore", invalid="ignore"):
        wrong = np.rint(x[:-5] * np.float32(1 / scale)).clip(-1500, 60000) + 2000
    assert (got[:-5] != wrong).any()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_softmax_of_many_rows(instruction_set: str) -> None:
    """Rows that are summed side by side, more than their group divides; zeros of both signs, rows of NaN and infinities."""
    rows, length = 203, 97
    x = np.random.default_rng(3).normal(scale=4, size=(rows, length)).astype(np.float32)
    x[::7] = -np.abs(x[::7])
    x[::7, ::2], x[::7, 1::3] = 0.0, -0.0
    x[5], x[6], x[8, 3], x[9, 96], x[10, 0] = np.nan, -np.inf, np.inf, np.nan, -np.inf
    request = KernelRequest(Softmax((rows, length), 1), ("float32",), "float32")

    class Rows(Case):
        def inputs(self) -> list[np.ndarray]:
            return [x]

    check(Rows(request, NoConstants(), 0), instruction_set)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 1, 1000), 1), ((203, 96), 1), ((5, 7, 60), 1), ((2, 9, 60), 3), ((2, 300, 48), 48), ((1, 300, 40), 8)],
    ids=str,
)
def test_normalization_in_rows_and_over_positions(shape: tuple[int, ...], groups: int, instruction_set: str) -> None:
    """One long row, rows side by side more than their group divides, groups over positions, wide and narrow; into codes."""
    axis = 1 if len(shape) == 3 and shape[1] > 1 else len(shape) - 1
    operator = GroupNormalization(shape, axis, len(shape) - 1, 1e-5, groups)
    rng = np.random.default_rng(4)
    x = rng.normal(3.0, 2.0, shape).astype(np.float32)
    vectors = [rng.normal(size=operator.channels).astype(np.float32) for _ in range(2)]
    constants = NormalizationConstants(*vectors, QuantizeConstants(0.03, Requantization(-100.0, 150.0, 101)))

    class Given(Case):
        def inputs(self) -> list[np.ndarray]:
            return [x]

    check(Given(KernelRequest(operator, ("float32",), "uint8"), constants, 0), instruction_set)
    check(Given(KernelRequest(operator, ("float32",), "float32"), NormalizationConstants(*vectors), 0), instruction_set)


def test_a_table_is_made_of_elementwise_constants() -> None:
    """A clip of 8-bit codes may be given as a requantize; its table holds what that would compute."""
    request = KernelRequest(Unary((5,), "clip", (0.0, 6.0)), ("uint8",), "uint8")
    constants = IntegerElementwiseConstants((9,), (np.float32(0.7),), Requantization(-4.0, 90.0, 30))
    kernel = CommonFamily().kernel(request)
    assert kernel is not None
    (table,) = kernel.pack(constants)
    codes = np.arange(256, dtype=np.uint8)
    want = numerics.evaluate(KernelRequest(Convert((256,)), ("uint8",), "uint8"), constants, [codes])
    np.testing.assert_array_equal(table, want)


def test_wrong_constants_are_refused() -> None:
    """Constants of another class name the operator, what it takes and what it got."""
    kernel = CommonFamily().kernel(KernelRequest(Convert((8,)), ("float32",), "uint8"))
    assert kernel is not None
    with pytest.raises(KernelError, match="takes QuantizeConstants, but NoConstants were given"):
        kernel.pack(NoConstants())
    kernel = CommonFamily().kernel(KernelRequest(Unary((8,), "elu", (1.0,)), ("float32",), "float32"))
    assert kernel is not None
    with pytest.raises(KernelError, match="has 1 parameters, but 2 were given"):
        kernel.pack(FloatElementwiseConstants((1.0, 2.0)))


def test_parameters_default_to_those_of_the_operator() -> None:
    """A float layer needs no constants besides its operator."""
    kernel = CommonFamily().kernel(KernelRequest(Add((8,), 0.0, math.inf), ("float32", "float32"), "float32"))
    assert kernel is not None
    np.testing.assert_array_equal(kernel.pack(NoConstants())[0], np.array([0, np.inf], np.float32))


@pytest.mark.parametrize(
    "request_",
    [
        KernelRequest(Opaque("relax.sort", ((4,),), (4,)), ("float32",), "float32"),
        KernelRequest(Conv2D((1, 4, 4, 4), 4, Window((1, 1))), ("uint8",), "uint8", "int8"),
        KernelRequest(Unary((4,), "sigmoid"), ("uint16",), "uint16"),
        KernelRequest(AveragePool2D((1, 4, 4, 4), Window((2, 2))), ("float32",), "uint8"),
        KernelRequest(MaxPool2D((1, 4, 4, 4), Window((2, 2))), ("uint8",), "float32"),
        KernelRequest(Add((4,)), ("uint8", "float32"), "float32"),
    ],
    ids=lambda r: f"{type(r.operator).__name__}-{'-'.join(r.inputs)}-{r.output}",
)
def test_other_requests_are_left_to_the_next_family(request_: KernelRequest) -> None:
    """What no precision makes, or other families serve, gets None and not a wrong kernel."""
    assert CommonFamily().kernel(request_) is None


def test_unknown_movements_and_missing_storages_are_refused() -> None:
    """Requests that contradict themselves are errors that say what is allowed."""
    with pytest.raises(KernelError, match="use reshape, permute_dims"):
        CommonFamily().kernel(KernelRequest(Movement("rotate", (4,), (4,)), ("uint8",), "uint8"))
    with pytest.raises(KernelError, match="reads 2 tensors, but the request names 1 storages"):
        CommonFamily().kernel(KernelRequest(Add((4,)), ("uint8",), "uint8"))


@given(groups=st.integers(2, 6), length=st.integers(2, 9), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_channel_shuffles_are_recognized(groups: int, length: int, seed: int) -> None:
    """Only the indices of a shuffle are taken for one."""
    shuffle = [g * length + i for i in range(length) for g in range(groups)]
    assert interleaved_groups(shuffle) == groups
    changed = list(shuffle)
    first, second = np.random.default_rng(seed).choice(len(shuffle), 2, replace=False)
    changed[first], changed[second] = changed[second], changed[first]
    assert interleaved_groups(changed) == 0
    assert interleaved_groups(sorted(shuffle)) == 0


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize(("bias", "beta"), [(1.0, 0.75), (2.0, 0.5), (1.0, 3.0), (0.0, 0.75)])
def test_normalization_of_any_float(bias: float, beta: float, instruction_set: str) -> None:
    """Sums of squares from denormal to ∞, and NaN, whether or not the power is one that leaves out what cannot happen."""
    magnitudes = np.geomspace(1e-30, 3e38, 505).astype(np.float32)
    x = np.concatenate([magnitudes, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1.8e19, 1.9e19], np.float32)])
    request = KernelRequest(LocalResponseNormalization(x.shape, 1, 1.0, beta, bias), ("float32",), "float32")

    class Given(Case):
        def inputs(self) -> list[np.ndarray]:
            return [x]

    check(Given(request, NoConstants(), 0), instruction_set)
