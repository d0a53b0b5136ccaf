"""C source of a compiled module, and how this machine's C compiler makes a library of it.

The contract holds in C99 under two conditions. Products are not contracted with sums (``-ffp-contract=off``; the fused
multiply-adds that are meant are calls of ``fmaf``), and float patterns may be read as integers (``-fno-strict-aliasing``).
"""

from __future__ import annotations

import shutil
from typing import Any

import tvm

from tvm_hquant.errors import ToolchainError

SOURCE_NAME = "model.c"
COMPILER_OPTIONS = ("-std=c99", "-O2", "-ffp-contract=off", "-fno-strict-aliasing")
"""What any compiler must be told, by the names of gcc and clang; -O2 is for speed only."""


def find_c_compiler() -> str:
    """Path of gcc, or of another C compiler of this machine that takes gcc's options.

    Raises:
        ToolchainError: there is none.
    """
    for name in ("gcc", "clang", "cc"):
        if (found := shutil.which(name)) is not None:
            return found
    raise ToolchainError("no C compiler was found to build the generated C source: install gcc or clang")


def compile_function() -> Any:
    """What ``export_library`` builds a library with: generated C and TVM's own files go in, a shared library comes out."""
    maths = ("-Wl,--no-as-needed", "-lm")  # named before the files that need it
    options = ["-shared", "-fPIC", *COMPILER_OPTIONS, *maths]
    return tvm.support.cc.cross_compiler(find_c_compiler(), options)


def module_source(executable: Any) -> str:
    """The C source of all kernels of an executable, to be compiled with :data:`COMPILER_OPTIONS`.

    Raises:
        ToolchainError: it was not built for a target of kind ``c``.
    """
    modules = [executable.mod, *executable.mod.imports]
    sources = [str(module.inspect_source()) for module in modules if str(module.kind) == "c"]
    if not sources:
        raise ToolchainError('no C source in the module: it was built for another target than kind = "c"')
    head = f"// Compile with {' '.join(COMPILER_OPTIONS)} and TVM's headers on the include path.\n"
    return head + "\n".join(sources)
