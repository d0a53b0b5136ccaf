"""Kernels of ``__dp4a`` and of tensor cores as C++ on this CPU, against the arithmetic contract.

Protects that tiles, tails, padding, words of less than four channels, several points, and outputs in a wider buffer give the
contract's bits; and that nvcc accepts the assembly of the tensor cores' kernels and keeps their sums in registers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.emulated_gpu.kernel_requests import DEPTHWISE, NOT_DEPTHWISE, PLACEMENT, WIDE
from tests.emulated_gpu.kernel_runs import FILL, KernelRun, compile_without_spills, run_kernels
from tests.kernels.anchor_cases import CASES, random_case
from tvm_hquant import numerics
from tvm_hquant.kernels.instruction_sets.cuda import depthwise_kernel, dp4a_kernel
from tvm_hquant.kernels.instruction_sets.cuda_mma import mma_kernel
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.operators import Epilogue
from tvm_hquant.stored_outputs import in_channel_order


def requests(names: tuple[str, ...], repeated: tuple[str, ...], grouped: str) -> list[KernelRequest]:
    """Layers from and to codes, one in a wider buffer, the ``grouped`` one also shuffled; some ``repeated`` with two points and
    planes, a residual, other outputs."""
    operators = {**CASES, **WIDE}
    found = [KernelRequest(operators[name], ("uint8",), "uint8", "int8") for name in names]
    found.append(replace(found[0], placement=PLACEMENT))
    found.append(replace(found[names.index(grouped)], shuffled=operators[grouped].groups))
    for name, output in zip(repeated, ("uint16", "float32", "float16"), strict=True):
        operator = replace(operators[name], epilogue=Epilogue(True, True))
        found.append(KernelRequest(operator, ("uint8", "uint8"), output, "int8", 2))
        found.append(KernelRequest(operator, ("uint16", "uint16"), output, "int8", 2))
    return found


FAMILIES: dict[str, tuple[Callable[[KernelRequest], Kernel | None], list[KernelRequest], str]] = {
    "dp4a": (dp4a_kernel, requests(NOT_DEPTHWISE, ("3x3 padded", "grouped", "dense, rows"), "grouped"), "__dp4a("),
    "depthwise": (depthwise_kernel, requests(DEPTHWISE, ("depthwise",) * 3, "depthwise"), "case_0_kernel("),
    "mma": (
        mma_kernel,
        requests((*WIDE, "grouped"), ("wide, padded", "wide, grouped", "wide, dense, rows"), "wide, grouped"),
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32",
    ),
}
"""Kernels, requests that they serve, and what stands in their source."""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_match_the_contract(tmp_path: Path, family: str) -> None:
    """Every request, with full-range codes and weights; a wider buffer stays as it was around the output."""
    make, served, instruction = FAMILIES[family]
    cases = [random_case(np.random.default_rng(i), request) for i, request in enumerate(served)]
    kernels = [make(request) for request, _, _ in cases]
    runs = [KernelRun(kernel, *case[1:]) for kernel, case in zip(kernels, cases, strict=True)]
    outputs, source = run_kernels(runs, tmp_path)
    assert instruction in source
    for kernel, (request, constants, inputs), output in zip(kernels, cases, outputs, strict=True):
        expected = numerics.evaluate(replace(request, placement=None, shuffled=0), constants, inputs)
        message = f"{kernel.name} {request}"
        np.testing.assert_array_equal(in_channel_order(request, output), expected, err_msg=message)
        beside = np.delete(output, request.output_offset + np.arange(expected.shape[-1]), -1)
        assert (beside == FILL).all(), message


def test_what_tensor_cores_do_not_serve() -> None:
    """Few channels, depthwise layers and floats are the next family's; so is a residual beside a place in a wider buffer."""
    for name in ("stem, three channels", "few outputs", "depthwise", "1x1"):
        assert mma_kernel(KernelRequest(CASES[name], ("uint8",), "uint8", "int8")) is None
    wide = WIDE["wide, padded"]
    assert mma_kernel(KernelRequest(wide, ("float16",), "float16", "float16")) is None
    with_residual = replace(wide, epilogue=Epilogue(True, True))
    request = KernelRequest(with_residual, ("uint8", "uint8"), "uint8", "int8", placement=PLACEMENT)
    assert mma_kernel(request) is None
    assert dp4a_kernel(request) is None


@pytest.mark.parametrize("architecture", ["80", "87", "90"])
def test_tensor_cores_compile_without_spills(tmp_path: Path, architecture: str) -> None:
    """ptxas knows the instruction on every GPU whose spec names the family, and the sums of a tile fit its registers."""
    request = KernelRequest(WIDE["wide, padded"], ("uint8",), "uint8", "int8")
    compile_without_spills(mma_kernel(request), architecture, tmp_path)
