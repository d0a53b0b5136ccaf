"""CUDA kernels as machine code in the library, on machines with or without an NVIDIA driver.

TVM compiles CUDA source through its CUDA runtime, which does not load without a driver: elsewhere the module keeps the source,
and the board's TVM compiles it whenever it loads the library (``cuda_fallback_module.h`` and ``cuda_module.cc`` of TVM). That
needs a compiler on the board, and one that keeps to the arithmetic contract: TVM's own call passes ``--use_fast_math``.
Here nvcc compiles the source when the artifact is made, and its machine code takes the place of the source in the
library. TVM's runtime loads it like one that it compiled by itself.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tvm

from tvm_hquant.errors import ToolchainError

_HOW_TO_GET_NVCC = (
    "install NVIDIA's CUDA toolkit, or 'pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl', or set CUDA_HOME "
    "to the folder that holds bin/nvcc; neither a GPU nor a driver is needed to compile"
)

NUMERICAL_OPTIONS = ("--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
"""What ``--use_fast_math`` would turn round: the contract allows no contraction, flushing or approximate division."""


def find_nvcc() -> Path:
    """nvcc from ``CUDA_HOME`` or ``CUDA_PATH``, from ``PATH``, or from NVIDIA's Python packages of this environment.

    Raises:
        ToolchainError: there is none.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = os.environ.get(variable)
        if folder and (Path(folder) / "bin" / "nvcc").is_file():
            return Path(folder) / "bin" / "nvcc"
    if found := shutil.which("nvcc"):
        return Path(found)
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages.submodule_search_locations or ()) if packages else ():
        if installed := sorted(Path(folder).glob("cu*/bin/nvcc")):
            return installed[-1]
    raise ToolchainError(
        f"a target with CUDA is compiled with nvcc, which this machine does not have: {_HOW_TO_GET_NVCC}"
    )


def compile_kernels(source: str, architecture: str) -> bytes:
    """Machine code for CUDA source: a fatbin for one GPU architecture.

    Args:
        source: CUDA C++.
        architecture: the GPU's, such as ``sm_87``.

    Raises:
        ToolchainError: nvcc is missing, or refuses the source or the architecture.
    """
    nvcc = find_nvcc()
    number = re.sub(r"^sm_", "", architecture)
    with TemporaryDirectory(prefix="tvm_hquant_") as folder:
        code, binary = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        code.write_text(source, encoding="utf-8")
        command = [str(nvcc), "--fatbin", "-O3", "-gencode", f"arch=compute_{number},code=sm_{number}"]
        try:
            result = subprocess.run(
                [*command, *NUMERICAL_OPTIONS, "-o", str(binary), str(code)],
                capture_output=True,
                text=True,
                check=False,
            )
        except OSError as error:
            raise ToolchainError(f"cannot run {nvcc}: {error.strerror or error}; {_HOW_TO_GET_NVCC}") from None
        if result.returncode != 0:
            lines = (result.stderr or result.stdout).strip().splitlines() or [f"exit code {result.returncode}"]
            first = next((line for line in lines if "error" in line or "fatal" in line), lines[-1])
            raise ToolchainError(f"{nvcc} cannot compile the kernels for {architecture}: {first}")
        return binary.read_bytes()


@contextmanager
def source_kept() -> Iterator[None]:
    """While it is open, TVM leaves CUDA source in the modules that it builds, whether there is a driver or not.

    So every machine makes the same library. TVM reads the variable whenever it makes a module; another build in another
    thread of this process would keep its source too, and compile it when it is loaded.
    """
    variable = "TVM_COMPILE_FORCE_FALLBACK"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def kernel_source(module: Any) -> str:
    """The CUDA source that a ``tvm.runtime.Module`` holds anywhere in its tree of imports.

    Raises:
        ToolchainError: it holds none, or several.
    """
    sources = [str(m.inspect_source()) for m in _with_imports(module) if m.kind == "cuda"]
    if len(sources) != 1:
        raise ToolchainError(f"TVM made {len(sources)} modules for the GPU, expected 1: this release of TVM differs")
    return sources[0]


def pack_machine_code(architecture: str) -> Callable[[Any, bool, str, str], str]:
    """The argument ``fpack_imports`` of ``export_library`` that puts machine code in the place of CUDA source.

    ``architecture`` is the GPU's, such as ``sm_87``.
    """

    def pack(module: Any, is_system_library: bool, prefix: str, folder: str) -> str:
        source = kernel_source(module)
        packed: bytes = tvm.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy().tobytes()
        replaced = replace_source(packed, source.encode(), compile_kernels(source, architecture))
        host = next(m for m in _with_imports(module) if m.kind == "llvm").get_function("_get_target_string")()
        path = os.path.join(folder, f"{prefix}devc.o")
        create = tvm.get_global_func("codegen.codegen_blob")
        create(replaced, is_system_library, host, prefix).write_to_file(path)
        return path

    return pack


def replace_source(packed: bytes, source: bytes, machine_code: bytes) -> bytes:
    """Serialized modules with ``machine_code`` in the place of CUDA ``source``.

    The layout, integers being 64-bit and little-endian and every sequence beginning with its length (TVM's
    ``src/target/codegen.cc`` and ``cuda_module.cc``): the size of all that follows; the import tree as two vectors; for each
    module its kind and, except for the library's own code, its content. A CUDA module's content is format, table of
    functions, code; the format ``cuda`` means source.

    Raises:
        ToolchainError: the bytes have another layout.
    """
    end = struct.pack("<Q", len(source)) + source
    start = _string(b"cuda")
    try:
        size, position = _integer(packed, 0)
        if size != len(packed) - 8:
            raise _other_layout(f"their size is given as {size}, it is {len(packed) - 8}")
        modules, position = _integer(packed, position)
        position += 8 * modules
        children, position = _integer(packed, position)
        position += 8 * children
        for _ in range(modules - 1):
            kind, position = _sequence(packed, position)
            if kind == b"_lib":
                continue
            content, after = _sequence(packed, position)
            if kind == b"cuda" and content.startswith(start) and content.endswith(end):
                functions = content[len(start) : -len(end)]
                compiled = _string(b"fatbin") + functions + _string(machine_code)
                body = packed[8:position] + _string(compiled) + packed[after:]
                return _string(body)
            position = after
    except (struct.error, IndexError):
        raise _other_layout("they end early") from None
    raise _other_layout("there is no CUDA source among them")


def _other_layout(reason: str) -> ToolchainError:
    return ToolchainError(
        f"cannot put the GPU's machine code into the library: TVM {tvm.__version__} packs modules in another way than this "
        f"release knows ({reason}); use the TVM release that tvm_hquant asks for"
    )


def _with_imports(module: Any) -> Iterator[Any]:
    yield module
    for imported in module.imports:
        yield from _with_imports(imported)


def _string(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _integer(packed: bytes, position: int) -> tuple[int, int]:
    """The integer at a position, and the position after it."""
    return int(struct.unpack_from("<Q", packed, position)[0]), position + 8


def _sequence(packed: bytes, position: int) -> tuple[bytes, int]:
    """The bytes with a length before them, and the position after them."""
    length, position = _integer(packed, position)
    if position + length > len(packed):
        raise IndexError(position + length)
    return packed[position : position + length], position + length
