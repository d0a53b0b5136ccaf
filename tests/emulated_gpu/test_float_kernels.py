"""Float kernels of CUDA as C++ on this CPU: fused multiply-adds against the contract's bits, tensor cores within their bound.

The emulated tensor core adds as the coarsest one that is known, in blocks and cut off, so that its results are not the
contract's. Protects tiles, tails, padding, odd numbers of channels, residuals, outputs in wider buffers; that the bound holds;
and that nvcc accepts the assembly and keeps sums in registers.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.emulated_gpu.kernel_requests import PLACEMENT, WIDE
from tests.emulated_gpu.kernel_runs import FILL, KernelRun, compile_without_spills, run_kernels
from tests.kernels.anchor_cases import CASES, random_case
from tvm_hquant import numerics
from tvm_hquant.kernels.cuda.float_mma import float_mma_kernel
from tvm_hquant.kernels.cuda.fma import fma_kernel
from tvm_hquant.kernels.instruction_sets.cuda_mma_float import INSTRUCTIONS as AMPERE
from tvm_hquant.kernels.instruction_sets.cuda_mma_float16 import INSTRUCTIONS as TURING
from tvm_hquant.kernels.interface import FloatAnchorConstants, KernelRequest
from tvm_hquant.operators import Conv2D, Epilogue, Window
from tvm_hquant.stored_outputs import in_channel_order

Case = tuple[KernelRequest, FloatAnchorConstants, list[np.ndarray]]
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
OPERATORS = {**CASES, **WIDE}


def requests(names: Sequence[str], storage: str, grouped: str) -> list[KernelRequest]:
    """Layers of a storage, one in a wider buffer, one shuffled, two with residuals and other outputs."""
    found = [KernelRequest(OPERATORS[name], (storage,), storage, storage) for name in names]
    found.append(replace(found[0], placement=PLACEMENT))
    found.append(replace(found[names.index(grouped)], shuffled=4))
    operator = replace(OPERATORS[names[1]], epilogue=Epilogue(True, True))
    found.append(KernelRequest(operator, (storage, "float32"), "float32", storage))
    found.append(KernelRequest(operator, (storage, storage), storage, storage))
    return found


def cases_of(served: Sequence[KernelRequest]) -> list[Case]:
    return [random_case(np.random.default_rng(i), request) for i, request in enumerate(served)]


def plain(request: KernelRequest) -> KernelRequest:
    """The request without a place of its own, which is what the contract speaks of."""
    return replace(request, placement=None, shuffled=0)


def check_beside(request: KernelRequest, output: np.ndarray) -> None:
    """Around an output in a wider buffer everything is as it was."""
    beside = np.delete(output, request.output_offset + np.arange(request.operator.output_shape[-1]), -1)
    assert (beside == FILL).all(), request


@NEEDS_COMPILER
def test_fused_multiply_adds_match_the_contract(tmp_path: Path) -> None:
    """Every form of convolution, every storage: a tile keeps one accumulator for each output, in the contract's order."""
    served = requests(tuple(CASES), "float32", "grouped")
    few = ("stem, three channels", "asymmetric, dilated", "grouped", "dense", "depthwise")
    served += [r for storage in ("float16", "bfloat16") for r in requests(few, storage, "grouped")]
    cases = cases_of(served)
    kernels = [fma_kernel(request) for request, _, _ in cases]
    assert all(kernel.is_bit_exact for kernel in kernels)
    outputs, source = run_kernels([KernelRun(k, *c[1:]) for k, c in zip(kernels, cases, strict=True)], tmp_path)
    assert "__fmaf_rn(" in source
    for (request, constants, inputs), output in zip(cases, outputs, strict=True):
        expected = numerics.evaluate(plain(request), constants, inputs)
        np.testing.assert_array_equal(in_channel_order(request, output), expected, err_msg=str(request))
        check_beside(request, output)


def run_tensor_cores(cases: Sequence[Case], instructions: Any, folder: Path) -> tuple[int, int]:
    """Checks every case against its limits; gives how many values there are, and how many are not the contract's."""
    kernels = [float_mma_kernel(request, instructions) for request, _, _ in cases]
    assert not any(kernel.is_bit_exact for kernel in kernels)
    outputs, source = run_kernels([KernelRun(k, *c[1:]) for k, c in zip(kernels, cases, strict=True)], folder)
    assert f"mma.sync.aligned.{instructions['float16'].name}" in source
    values = different = 0
    for (request, constants, inputs), output in zip(cases, outputs, strict=True):
        actual = in_channel_order(request, output)
        limits = numerics.tensor_core_limits(plain(request), constants, inputs)
        assert numerics.beyond_limits(actual, limits, request.output) == (0, 0.0), request
        check_beside(request, output)
        values += actual.size
        different += int((actual != numerics.evaluate(plain(request), constants, inputs)).sum())
    return values, different


@NEEDS_COMPILER
@pytest.mark.parametrize("instructions", [TURING, AMPERE], ids=["turing", "ampere"])
def test_tensor_cores_stay_within_their_bound(tmp_path: Path, instructions: Any) -> None:
    """Every value lies between its limits, though many are not the contract's: the bound is needed, and it holds."""
    names = (*WIDE, "grouped")
    cases = cases_of([r for storage in instructions for r in requests(names, storage, "wide, grouped")])
    values, different = run_tensor_cores(cases, instructions, tmp_path)
    assert 0 < different < values


@st.composite
def convolutions(draw: st.DrawFn) -> Conv2D:
    """Convolutions with channels enough for tensor cores; sizes, tails, windows and groups as they come."""
    groups = draw(st.integers(1, 3))
    window = Window(
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        tuple(draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))),  # type: ignore[arg-type]
        (draw(st.integers(1, 2)), 1),
    )
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(5, 8)),
        draw(st.integers(3, 8)),
        groups * draw(st.integers(8, 41)),
    )
    return Conv2D(shape, groups * draw(st.integers(8, 41)), window, groups, Epilogue(draw(st.booleans())))


@NEEDS_COMPILER
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(convs=st.lists(convolutions(), min_size=6, max_size=6), seed=st.integers(0, 99))
def test_any_shape(tmp_path_factory: pytest.TempPathFactory, convs: list[Conv2D], seed: int) -> None:
    """Random shapes on tensor cores within their bound, and by fused multiply-adds bit for bit."""
    storages = ("float16", "bfloat16")
    served = [KernelRequest(conv, (storages[i % 2],), storages[i % 2], storages[i % 2]) for i, conv in enumerate(convs)]
    cases = [random_case(np.random.default_rng(seed + i), request) for i, request in enumerate(served)]
    run_tensor_cores(cases, AMPERE, tmp_path_factory.mktemp("mma"))
    runs = [KernelRun(fma_kernel(request), constants, inputs) for request, constants, inputs in cases]
    outputs, _ = run_kernels(runs, tmp_path_factory.mktemp("fma"))
    for (request, constants, inputs), output in zip(cases, outputs, strict=True):
        np.testing.assert_array_equal(output, numerics.evaluate(request, constants, inputs), err_msg=str(request))


@NEEDS_COMPILER
def test_infinities_do_not_spread(tmp_path: Path) -> None:
    """Channels that do not exist are read as zeros, not as what lies there: infinity times weight 0 would be NaN."""
    request, constants, inputs = cases_of(
        [KernelRequest(WIDE["wide, strided, dilated"], ("float16",), "float16", "float16")]
    )[0]
    odd = Conv2D((1, 3, 3, 19), 8, Window((1, 1)))
    cases = [(request, constants, inputs), *cases_of([replace(request, operator=odd)])]
    for _, _, (x, *_) in cases:
        x[..., ::2, -1] = np.inf
    assert run_tensor_cores(cases, AMPERE, tmp_path)[0] > 0
    _, own, (x,) = cases[1]
    assert not np.isnan(numerics.evaluate(cases[1][0], own, [x])).any()


def test_what_they_do_not_serve() -> None:
    """Codes, float32 on tensor cores, bfloat16 on Turing, few channels, and depthwise layers are left to others."""
    wide, depthwise = WIDE["wide, padded"], CASES["depthwise"]
    for storage in ("float16", "bfloat16"):
        assert float_mma_kernel(KernelRequest(depthwise, (storage,), storage, storage), AMPERE) is None
        for name in ("stem, three channels", "few outputs", "grouped, few channels"):
            assert float_mma_kernel(KernelRequest(CASES[name], (storage,), storage, storage), AMPERE) is None
    assert float_mma_kernel(KernelRequest(wide, ("bfloat16",), "bfloat16", "bfloat16"), TURING) is None
    assert float_mma_kernel(KernelRequest(wide, ("float32",), "float32", "float32"), AMPERE) is None
    assert float_mma_kernel(KernelRequest(wide, ("uint8",), "uint8", "int8"), AMPERE) is None
    assert fma_kernel(KernelRequest(wide, ("uint8",), "uint8", "int8")) is None


@pytest.mark.parametrize(
    ("architecture", "instructions", "storage"),
    [("75", TURING, "float16"), ("80", AMPERE, "float16"), ("87", AMPERE, "bfloat16"), ("90", AMPERE, "bfloat16")],
)
def test_tensor_cores_compile_without_spills(
    tmp_path: Path, architecture: str, instructions: Any, storage: str
) -> None:
    """ptxas knows the instruction on every GPU whose spec names the family, and the sums of a tile fit its registers."""
    request = KernelRequest(WIDE["wide, padded"], (storage,), storage, storage)
    compile_without_spills(float_mma_kernel(request, instructions), architecture, tmp_path)


def test_fused_multiply_adds_compile_without_spills(tmp_path: Path) -> None:
    """The sums of a thread's tile fit its registers."""
    request = KernelRequest(WIDE["wide, padded"], ("float32",), "float32", "float32")
    compile_without_spills(fma_kernel(request), "80", tmp_path)
