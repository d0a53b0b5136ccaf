"""Single CUDA kernels: as C++ on this CPU, and through nvcc."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tvm

from tvm_hquant.cuda_compilation import NUMERICAL_OPTIONS, find_nvcc, kernel_source, source_kept
from tvm_hquant.errors import ToolchainError
from tvm_hquant.kernels.interface import Kernel, LayerConstants
from tvm_hquant.tensor_format import STORAGE_DTYPE

Array = npt.NDArray[Any]

FILL = 77
"""What output buffers hold before a kernel runs."""
_TARGET = {"kind": "cuda", "arch": "sm_75", "host": {"kind": "llvm"}}


@dataclass(frozen=True)
class KernelRun:
    """A kernel and what it is called with."""

    kernel: Kernel
    constants: LayerConstants
    inputs: Sequence[Array]


def run_kernels(runs: Sequence[KernelRun], folder: Path) -> tuple[list[Array], str]:
    """The output buffer of every kernel, and the CUDA source of all."""
    names = {f"case_{i}": run for i, run in enumerate(runs)}
    source = generated({name: run.kernel for name, run in names.items()})
    library = _emulated(source, folder)
    outputs = []
    for name, run in names.items():
        request = run.kernel.request
        output = np.full(request.output_shape, FILL, STORAGE_DTYPE[request.output])
        # In the order of the function's parameters: inputs, constants, output.
        constants = run.kernel.pack(run.constants)
        arrays = [np.ascontiguousarray(a) for a in (*run.inputs, *constants, output)]
        order = _parameter_order(source, name, len(run.inputs), len(constants))
        pointers = [ctypes.c_void_p(arrays[i].ctypes.data) for i in order]
        arguments = (ctypes.c_void_p * len(order))(*(ctypes.addressof(p) for p in pointers))
        dimensions = (ctypes.c_uint * 6)(*_launch_dimensions(run.kernel))
        getattr(library, f"emulate_{name}_kernel")(dimensions, arguments)
        outputs.append(arrays[-1])
    return outputs, source


def generated(kernels: dict[str, Kernel]) -> str:
    """CUDA source of kernels."""
    functions = {name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    with source_kept():
        return kernel_source(tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(_TARGET)).mod)


def compile_without_spills(kernel: Kernel | None, architecture: str, folder: Path) -> None:
    """Asserts that nvcc takes a kernel and keeps everything in registers; skips the test where there is no nvcc."""
    try:
        nvcc = find_nvcc()
    except ToolchainError as reason:
        pytest.skip(str(reason))
    assert kernel is not None
    code = folder / "kernels.cu"
    code.write_text(generated({"layer": kernel}), encoding="utf-8")
    options = ["--cubin", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", *NUMERICAL_OPTIONS]
    result = subprocess.run([nvcc, *options, "-o", folder / "code", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in result.stderr


def _emulated(source: str, folder: Path) -> ctypes.CDLL:
    """A library with ``emulate_<name>_kernel`` for every kernel."""
    code, binary = folder / "kernels.cu", folder / "kernels"
    code.write_text(source, encoding="utf-8")
    compiler = Path(__file__).with_name("nvcc.py")
    environment = {**os.environ, "EMULATED_GPU_LIBRARIES": str(folder)}
    subprocess.run([sys.executable, compiler, "-o", binary, code], check=True, env=environment)
    return ctypes.CDLL(re.sub(r"\0.*", "", binary.read_text(encoding="utf-8")))


def _launch_dimensions(kernel: Kernel) -> list[int]:
    """Blocks and threads that the function binds."""
    text = kernel.function.script()
    extents = [re.search(rf'thread_binding\((\d+), thread="{axis}.x"\)', text) for axis in ("blockIdx", "threadIdx")]
    blocks, threads = (int(found[1]) for found in extents)
    return [blocks, 1, 1, threads, 1, 1]


def _parameter_order(source: str, name: str, inputs: int, constants: int) -> list[int]:
    """Which array each parameter of a kernel is: constants have names, the others come in the order of their use."""
    parameters = re.findall(rf"{name}_kernel\((.*?)\)", source)[-1]
    unnamed = iter([*range(inputs), inputs + constants])
    order = []
    for parameter in parameters.split(","):
        constant = re.search(r"\bconstant_(\d)", parameter)
        order.append(inputs + int(constant[1]) if constant else next(unnamed))
    return order
