"""C source of a compiled module, and how this machine's C compiler makes a library of it.

The contract holds in C99 under two conditions. Products are not contracted with sums (``-ffp-contract=off``; the fused
multiply-adds that are meant are calls of ``fmaf``), and float patterns may be read as integers (``-fno-strict-aliasing``).
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import tvm

from tvm_hquant.errors import ToolchainError

SOURCE_NAME = "model.c"
COMPILER_OPTIONS = ("-std=c99", "-O2", "-ffp-contract=off", "-fno-strict-aliasing")
"""What any compiler must be told, by the names of gcc and clang; -O2 is for speed only."""
_GUARD = r'#ifdef __cplusplus\nextern "C"\n#endif\n'
_DECLARATION = re.compile(rf"(?:{_GUARD})?TVM_DLL \w+ (?!__tvm|TVM)\w+\([^()]*\);\n")
"""Of a function that the generator finds outside: all are of math.h, which the source includes."""
_FUNCTION = re.compile(
    rf"((?:{_GUARD})?TVM_DLL int32_t __tvm_ffi_(\w+)\(void\* self_handle, [^()]*, void\* result\) {{\n)(.*?\n}}\n)",
    re.DOTALL,
)
"""The definition of a kernel: its head, its name, its body."""
_POINTER = re.compile(r"^  \w+\* (\w+) = .*;\n", re.MULTILINE)
_TEXT = re.compile(r'"[^"\n]*"')


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


def module_source(executable: Any, layers: Mapping[str, Sequence[str]]) -> str:
    """The C source of all kernels of an executable, to be compiled with :data:`COMPILER_OPTIONS`.

    It is what the library is made of, with less for compilers to warn of and more for people to read: ``layers`` are the layers
    that call each function, by its name.

    Raises:
        ToolchainError: it was not built for a target of kind ``c``.
    """
    modules = [executable.mod, *executable.mod.imports]
    sources = [str(module.inspect_source()) for module in modules if str(module.kind) == "c"]
    if not sources:
        raise ToolchainError('no C source in the module: it was built for another target than kind = "c"')
    head = (
        f"// Compile with {' '.join(COMPILER_OPTIONS)} and TVM's headers on the path of system headers (-isystem).\n"
        "// Each function is one kernel; its arguments are the activations, the constants and the output.\n"
    )
    return head + "\n".join(_for_people(source, layers) for source in sources)


def _for_people(source: str, layers: Mapping[str, Sequence[str]]) -> str:
    """The same code without warnings, each function with the names of its layers."""

    def annotated(function: re.Match[str]) -> str:
        head, symbol, body = function.groups()
        names = ", ".join(layers.get(symbol, ())).replace("\n", " ") or symbol
        words = Counter(re.findall(r"\w+", _TEXT.sub("", body)))
        # TVM's calling convention has two arguments that no kernel reads, and functions without parameters get an empty array.
        body = _POINTER.sub(lambda line: line[0] + _unread(line[1]) if words[line[1]] == 1 else line[0], body)
        return f"// {names}\n{head}{_unread('self_handle')}{_unread('result')}{body}"

    return _FUNCTION.sub(annotated, _DECLARATION.sub("", source))


def _unread(name: str) -> str:
    return f"  (void){name};\n"
