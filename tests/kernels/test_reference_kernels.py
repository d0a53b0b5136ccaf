"""The reference family: plain loops for every operator, on any LLVM processor and, scheduled by dlight, in CUDA.

Protects the backend of targets without kernels of their own, and that a realized module can be read back.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL_KINDS,
    CODES,
    COMPOSITION,
    FLOATS,
    STORAGES,
    Case,
    assert_matches_contract,
    group_normalizations,
    matmuls,
    seeds,
    unary_case,
    windows,
)
from tvm.s_tir import dlight

from tvm_hquant import numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.constant_arrays import from_arrays, to_arrays
from tvm_hquant.kernels.interface import (
    FloatAnchorConstants,
    IntegerAnchorConstants,
    KernelRequest,
    NoConstants,
    Requantization,
)
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.operators import (
    Composition,
    Conv2D,
    Dense,
    Epilogue,
    GroupNormalization,
    LocalResponseNormalization,
    Opaque,
    Softmax,
    Window,
)

ANY_PROCESSOR = {"kind": "llvm"}
few = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def anchors(draw: st.DrawFn) -> Conv2D | Dense:
    epilogue = Epilogue(draw(st.booleans()), draw(st.booleans()))
    if draw(st.booleans()):
        leading = draw(st.sampled_from([(), (2, 3)]))
        return Dense(
            6 if leading else draw(st.integers(1, 6)),
            draw(st.integers(1, 20)),
            draw(st.integers(1, 9)),
            epilogue,
            leading,
        )
    height, width = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    groups, inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = (draw(st.integers(1, 2)), height, width, groups * inputs)
    return Conv2D(shape, groups * outputs, draw(windows(height, width)), groups, epilogue)


@st.composite
def integer_anchors(draw: st.DrawFn) -> Case:
    operator, seed, points = draw(anchors()), draw(seeds), draw(st.integers(1, 2))
    rng = np.random.default_rng(seed)
    source, output = draw(st.sampled_from(CODES)), draw(st.sampled_from(STORAGES))
    inputs = (source, *([draw(st.sampled_from(CODES))] if operator.epilogue.has_residual else []))
    request = KernelRequest(operator, inputs, output, "int8", points)
    codes = rng.integers(-127, 127, (points, *operator.weight_shape), endpoint=True).astype(np.int8)
    channels = operator.weight_shape[0]
    top = {"uint8": 255, "uint16": 65535}.get(output, 0)
    zero_point = int(rng.integers(0, top, endpoint=True))
    bounds = (-zero_point, top - zero_point) if top else (-100.0, 1e6)
    reach = max(top, 100) / (127 * np.iinfo(source).max * np.sqrt(codes[0, 0].size))
    constants = IntegerAnchorConstants(
        codes,
        int(rng.integers(0, np.iinfo(source).max, endpoint=True)),
        (rng.uniform(0.3, 1, (points, channels)) * reach).astype(np.float32),
        rng.uniform(-5, 5, channels).astype(np.float32),
        Requantization(*(float(b) for b in bounds), zero_point),
        float(np.float32(rng.uniform(0.001, 0.5))),
        int(rng.integers(0, 256)),
    )
    return Case(request, constants, seed)


@st.composite
def float_anchors(draw: st.DrawFn) -> Case:
    operator, seed = draw(anchors()), draw(seeds)
    rng = np.random.default_rng(seed)
    kinds = [draw(st.sampled_from(FLOATS)) for _ in range(4)]
    inputs = tuple(kinds[: 1 + operator.epilogue.has_residual])
    weights = numerics.narrow(rng.normal(size=operator.weight_shape).astype(np.float32), kinds[2])
    bias = rng.normal(size=operator.weight_shape[0]).astype(np.float32)
    constants = FloatAnchorConstants(weights, bias, -2.0, 1e9)
    return Case(KernelRequest(operator, inputs, kinds[3], kinds[2]), constants, seed)


KINDS = {**ALL_KINDS, "integer anchors": integer_anchors(), "float anchors": float_anchors(), "matmuls": matmuls()}


@pytest.mark.parametrize("kind", KINDS)
@few
@given(data=st.data())
def test_random_layers_match_the_contract(kind: str, data: st.DataObject) -> None:
    """Plain loops on a processor of which nothing is known compute the oracle's bits, convolutions included."""
    case = data.draw(KINDS[kind])
    assert_matches_contract(ReferenceFamily().kernel(case.request), case, ANY_PROCESSOR)


@pytest.mark.parametrize("function", [*numerics.PARAMETER_COUNTS, COMPOSITION])
def test_float_unary_functions_match_the_contract(function: str | Composition) -> None:
    """The polynomials on scalars."""
    case = unary_case(function, (3, 100), "float32", "float32", 5)
    assert_matches_contract(ReferenceFamily().kernel(case.request), case, ANY_PROCESSOR)


@few
@given(case=st.one_of(integer_anchors(), float_anchors(), group_normalizations()))
def test_constants_can_be_read_back(case: Case) -> None:
    """A kernel's packed constants are those of ``constant_arrays``, so that a module's layers can be checked and changed."""
    kernel = ReferenceFamily().kernel(case.request)
    assert kernel is not None
    packed = kernel.pack(case.constants)
    again = to_arrays(from_arrays(type(case.constants).__name__, packed))
    for array, other in zip(packed, again, strict=True):
        np.testing.assert_array_equal(array, other)


def test_opaque_layers_have_no_kernel() -> None:
    """They are TVM's to legalize."""
    request = KernelRequest(Opaque("relax.sort", ((4,),), (4,)), ("float32",), "float32")
    assert ReferenceFamily().kernel(request) is None


def test_wrong_constants_are_refused() -> None:
    """An integer layer given float constants says so instead of packing nonsense."""
    request = KernelRequest(Dense(1, 4, 4), ("uint8",), "uint8", "int8")
    kernel = ReferenceFamily().kernel(request)
    assert kernel is not None
    with pytest.raises(KernelError, match="takes IntegerAnchorConstants, but NoConstants were given"):
        kernel.pack(NoConstants())


PADDED = Window((3, 3), (1, 1), (1, 1, 1, 1))
CUDA_REQUESTS = [
    KernelRequest(Conv2D((1, 8, 8, 8), 16, PADDED, 1, Epilogue(True, True)), ("uint8", "uint8"), "uint8", "int8"),
    KernelRequest(Conv2D((1, 8, 8, 8), 16, PADDED), ("uint16",), "float32", "int8", 2),
    KernelRequest(Conv2D((1, 8, 8, 8), 8, PADDED, 8, Epilogue(True)), ("float16",), "float16", "float16"),
    KernelRequest(Dense(1, 32, 10), ("float32",), "float32", "float32"),
    KernelRequest(Softmax((1, 10), 1), ("float32",), "float32"),
    KernelRequest(LocalResponseNormalization((1, 4, 4, 8), 5, 0.1, 0.75, 1.0), ("bfloat16",), "bfloat16"),
    KernelRequest(GroupNormalization((2, 9, 40), 1, 2, 1e-5, 2), ("float32",), "uint8"),
    unary_case("gelu", (4, 40), "float32", "float32", 0).request,
]


def cuda_source(request: KernelRequest) -> str:
    """The CUDA source that TVM writes for a request after dlight gave it threads."""
    kernel = ReferenceFamily("cuda").kernel(request)
    assert kernel is not None
    target = tvm.target.Target(
        {"kind": "cuda", "arch": "sm_87", "max_threads_per_block": 1024, "thread_warp_size": 32}, host="llvm"
    )
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    with target:
        module = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(module)
        library = tvm.compile(module, target=target)
    (device,) = library.mod.imports
    return str(device.inspect_source())


@pytest.mark.parametrize("request_", CUDA_REQUESTS, ids=lambda r: f"{type(r.operator).__name__}-{r.inputs[0]}")
def test_dlight_schedules_for_cuda(request_: KernelRequest) -> None:
    """Every loop nest gets threads, and all float arithmetic is spelled with intrinsics that nvcc cannot contract."""
    source = cuda_source(request_)
    assert source.count("__global__") >= 1
    assert "threadIdx.x" in source
    assert "__fmaf_rn(" in source or "__fadd_rn(" in source
    # An addition whose operand is a product of floats would be contracted.
    assert not re.search(r"\)\s*\*\s*\(?\(?float.*\+", source)
