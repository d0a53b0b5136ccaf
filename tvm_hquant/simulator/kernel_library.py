"""Compiled kernels as shared libraries: made from kernels, carried as bytes to other processes or onto a disk, loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tvm
from tvm import IRModule, relax

from tvm_hquant.compilation import build_module
from tvm_hquant.errors import ToolchainError
from tvm_hquant.kernels.interface import Kernel
from tvm_hquant.passes.simulate_quantization import simulate_quantization


class Library(NamedTuple):
    """A shared library: its kernels by symbol, and the Relax functions that it holds beside them."""

    content: bytes
    symbols: tuple[str, ...]
    functions: tuple[str, ...] = ()


def built_kernels(kernels: Sequence[Kernel], target: Any) -> Any:
    """An executable that holds kernels alone, by their symbols. What calls them gives each the arrays that it is for.

    Raises:
        ToolchainError: TVM cannot generate code for them.
    """
    module = simulate_quantization(kernels)(IRModule())
    return build_module(module, target, "this machine", checks_arguments=False)


def exported(executable: Any) -> bytes:
    """The shared library of an executable.

    Raises:
        ToolchainError: it cannot be linked.
    """
    with tempfile.TemporaryDirectory(prefix="hquant_") as folder:
        path = Path(folder) / "kernels.so"
        try:
            executable.export_library(str(path))
        except RuntimeError as error:
            raise ToolchainError(f"cannot link the kernels of the simulator: {error}") from error
        return path.read_bytes()


def loaded_functions(library: Library) -> dict[str, Callable[..., Any]]:
    """The kernels and functions of a library by name, as this process calls them."""
    with tempfile.NamedTemporaryFile(prefix="hquant_", suffix=".so") as file:
        file.write(library.content)
        file.flush()
        module = tvm.runtime.load_module(file.name)
    found = {symbol: module.get_function(symbol, query_imports=True) for symbol in library.symbols}
    if library.functions:
        virtual_machine = relax.VirtualMachine(module, tvm.cpu())
        found.update({name: virtual_machine[name] for name in library.functions})
    return found
