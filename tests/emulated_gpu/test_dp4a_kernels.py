"""Kernels of ``__dp4a`` as C++ on this CPU, thread after thread, against the arithmetic contract.

Protects that tiles, tails, padding, words of less than four channels and several points give the contract's bits.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.kernels.test_anchor_kernels import CASES, random_case
from tvm_hquant import numerics
from tvm_hquant.cuda_compilation import kernel_source, source_kept
from tvm_hquant.kernels.cuda_dp4a import dp4a_kernel
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.operators import Conv2D, Epilogue
from tvm_hquant.tensor_format import STORAGE_DTYPE

TARGET = {"kind": "cuda", "arch": "sm_75", "host": {"kind": "llvm"}}


def requests() -> list[KernelRequest]:
    """All forms of convolutions but depthwise ones; two points and planes, a residual, outputs of other storages."""
    operators = [op for op in CASES.values() if not (isinstance(op, Conv2D) and op.is_depthwise)]
    found = [KernelRequest(operator, ("uint8",), "uint8", "int8") for operator in operators]
    for name, output in (("3x3 padded", "uint16"), ("grouped", "float32"), ("dense, rows", "float16")):
        operator = replace(CASES[name], epilogue=Epilogue(True, True))
        found.append(KernelRequest(operator, ("uint8", "uint8"), output, "int8", 2))
        found.append(KernelRequest(operator, ("uint16", "uint16"), output, "int8", 2))
    return found


def emulated(kernels: dict[str, Kernel], folder: Path) -> ctypes.CDLL:
    """A library with ``emulate_<name>_kernel`` for every kernel."""
    functions = {name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    with source_kept():
        source = kernel_source(tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(TARGET)).mod)
    assert "__dp4a(" in source
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
def test_dp4a_kernels_match_the_contract(tmp_path: Path) -> None:
    """Every request, with full-range codes and weights."""
    cases = {f"case_{i}": random_case(np.random.default_rng(i), request) for i, request in enumerate(requests())}
    kernels = {name: dp4a_kernel(request) for name, (request, _, _) in cases.items()}
    library = emulated(kernels, tmp_path)
    for name, (request, constants, inputs) in cases.items():
        output = np.zeros(request.operator.output_shape, STORAGE_DTYPE[request.output])
        # In the order of the function's parameters: inputs, constants, output.
        arrays = [np.ascontiguousarray(a) for a in (*inputs, *kernels[name].pack(constants), output)]
        order = parameter_order(tmp_path, name, len(arrays))
        pointers = [ctypes.c_void_p(arrays[i].ctypes.data) for i in order]
        arguments = (ctypes.c_void_p * len(order))(*(ctypes.addressof(p) for p in pointers))
        dimensions = (ctypes.c_uint * 6)(*launch_dimensions(kernels[name]))
        getattr(library, f"emulate_{name}_kernel")(dimensions, arguments)
        expected = numerics.evaluate(request, constants, inputs)
        np.testing.assert_array_equal(arrays[-1], expected, err_msg=kernels[name].name)


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
