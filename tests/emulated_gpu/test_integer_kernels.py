"""Kernels of ``__dp4a`` and of tensor cores as C++ on this CPU, against the arithmetic contract.

Protects that tiles, tails, padding, words of less than four channels, several points, and outputs in a wider buffer give the
contract's bits; and that nvcc accepts the assembly of the tensor cores' kernels and keeps their sums in registers.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.kernels.test_anchor_kernels import CASES, random_case
from tvm_hquant import numerics
from tvm_hquant.cuda_compilation import NUMERICAL_OPTIONS, find_nvcc, kernel_source, source_kept
from tvm_hquant.errors import ToolchainError
from tvm_hquant.kernels.instruction_sets.cuda import dp4a_kernel
from tvm_hquant.kernels.instruction_sets.cuda_mma import mma_kernel
from tvm_hquant.kernels.interface import Kernel, KernelRequest, Placement
from tvm_hquant.operators import Conv2D, Dense, Epilogue, Window
from tvm_hquant.stored_outputs import in_channel_order
from tvm_hquant.tensor_format import STORAGE_DTYPE

TARGET = {"kind": "cuda", "arch": "sm_75", "host": {"kind": "llvm"}}


WIDE = {
    "wide, padded": Conv2D((1, 7, 6, 64), 40, Window((3, 3), padding=(1, 1, 1, 1)), 1, Epilogue(has_bias=True)),
    "wide, strided, dilated": Conv2D((2, 9, 8, 18), 9, Window((2, 3), (1, 2), (2, 0, 1, 3), (2, 1))),
    "wide, grouped": Conv2D((1, 5, 5, 100), 48, Window((1, 1)), groups=2),
    "wide, dense": Dense(1, 70, 130),
    "wide, dense, rows": Dense(37, 48, 8),
}
"""Channels enough for tensor cores, with and without whole words, steps and tiles."""
PLACEMENT = Placement(3, 60)


def requests(names: tuple[str, ...], repeated: tuple[str, ...], grouped: str) -> list[KernelRequest]:
    """Layers from and to codes, one in a wider buffer, the ``grouped`` one also shuffled; some ``repeated`` with two points and
    planes, a residual, other outputs."""
    operators = {**CASES, **WIDE}
    found = [KernelRequest(operators[name], ("uint8",), "uint8", "int8") for name in names]
    found.append(replace(found[0], placement=PLACEMENT))
    found.append(replace(found[names.index(grouped)], shuffled=True))
    for name, output in zip(repeated, ("uint16", "float32", "float16"), strict=True):
        operator = replace(operators[name], epilogue=Epilogue(True, True))
        found.append(KernelRequest(operator, ("uint8", "uint8"), output, "int8", 2))
        found.append(KernelRequest(operator, ("uint16", "uint16"), output, "int8", 2))
    return found


NOT_DEPTHWISE = tuple(n for n, op in CASES.items() if not (isinstance(op, Conv2D) and op.is_depthwise))
FAMILIES: dict[str, tuple[Callable[[KernelRequest], Kernel | None], list[KernelRequest], str]] = {
    "dp4a": (dp4a_kernel, requests(NOT_DEPTHWISE, ("3x3 padded", "grouped", "dense, rows"), "grouped"), "__dp4a("),
    "mma": (
        mma_kernel,
        requests((*WIDE, "grouped"), ("wide, padded", "wide, grouped", "wide, dense, rows"), "wide, grouped"),
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32",
    ),
}
"""A family's kernels, requests that it serves, and what stands in its source."""


def generated(kernels: dict[str, Kernel]) -> str:
    """CUDA source of kernels."""
    functions = {name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    with source_kept():
        return kernel_source(tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(TARGET)).mod)


def emulated(source: str, folder: Path) -> ctypes.CDLL:
    """A library with ``emulate_<name>_kernel`` for every kernel."""
    code, binary = folder / "kernels.cu", folder / "kernels"
    code.write_text(source, encoding="utf-8")
    compiler = Path(__file__).with_name("nvcc.py")
    environment = {**os.environ, "EMULATED_GPU_LIBRARIES": str(folder)}
    subprocess.run([sys.executable, compiler, "-o", binary, code], check=True, env=environment)
    return ctypes.CDLL(re.sub(r"\0.*", "", binary.read_text(encoding="utf-8")))


def launch_dimensions(kernel: Kernel) -> list[int]:
    """Blocks and threads that the function binds."""
    text = kernel.function.script()
    extents = [re.search(rf'thread_binding\((\d+), thread="{axis}.x"\)', text) for axis in ("blockIdx", "threadIdx")]
    blocks, threads = (int(found[1]) for found in extents)
    return [blocks, 1, 1, threads, 1, 1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_match_the_contract(tmp_path: Path, family: str) -> None:
    """Every request, with full-range codes and weights; a wider buffer stays as it was around the output."""
    make, served, instruction = FAMILIES[family]
    cases = {f"case_{i}": random_case(np.random.default_rng(i), request) for i, request in enumerate(served)}
    kernels = {name: make(request) for name, (request, _, _) in cases.items()}
    source = generated(kernels)
    assert instruction in source
    library = emulated(source, tmp_path)
    for name, (request, constants, inputs) in cases.items():
        output = np.full(request.output_shape, 77, STORAGE_DTYPE[request.output])
        # In the order of the function's parameters: inputs, constants, output.
        arrays = [np.ascontiguousarray(a) for a in (*inputs, *kernels[name].pack(constants), output)]
        order = parameter_order(tmp_path, name, len(arrays))
        pointers = [ctypes.c_void_p(arrays[i].ctypes.data) for i in order]
        arguments = (ctypes.c_void_p * len(order))(*(ctypes.addressof(p) for p in pointers))
        dimensions = (ctypes.c_uint * 6)(*launch_dimensions(kernels[name]))
        getattr(library, f"emulate_{name}_kernel")(dimensions, arguments)
        expected = numerics.evaluate(replace(request, placement=None, shuffled=False), constants, inputs)
        message = f"{kernels[name].name} {request}"
        np.testing.assert_array_equal(in_channel_order(request, arrays[-1]), expected, err_msg=message)
        beside = np.delete(arrays[-1], request.output_offset + np.arange(expected.shape[-1]), -1)
        assert (beside == 77).all(), message


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
    try:
        nvcc = find_nvcc()
    except ToolchainError as reason:
        pytest.skip(str(reason))
    kernel = mma_kernel(KernelRequest(WIDE["wide, padded"], ("uint8",), "uint8", "int8"))
    assert kernel is not None
    code = tmp_path / "kernels.cu"
    code.write_text(generated({"layer": kernel}), encoding="utf-8")
    options = ["--cubin", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", *NUMERICAL_OPTIONS]
    result = subprocess.run(
        [nvcc, *options, "-o", tmp_path / "code", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in result.stderr


def parameter_order(folder: Path, name: str, count: int) -> list[int]:
    """Which array each parameter of a kernel is: constants have names, the others come in the order of their use."""
    source = (folder / "kernels.cu").read_text(encoding="utf-8")
    parameters = re.findall(rf"{name}_kernel\((.*?)\)", source)[-1]
    unnamed = iter([*range(count - 7), count - 1])
    order = []
    for parameter in parameters.split(","):
        constant = re.search(r"\bconstant_(\d)", parameter)
        order.append(count - 7 + int(constant[1]) if constant else next(unnamed))
    return order
