"""Copies of Python packages that believe they run on a CPU without AVX-512.

OpenVINO's kernel library has a switch (``ONEDNN_MAX_CPU_ISA``), ONNX Runtime has none: its kernels are chosen by ``cpuid`` and
``xgetbv``, and the latter says which registers the operating system saves. In the copy, every ``xgetbv`` in the compiled
code is replaced by ``mov al, 7``: x87, SSE and AVX registers, no AVX-512 ones. Nothing else changes, so the copy takes the
code that it would take on a machine that has AVX2 only.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_READ_ENABLED = b"\x0f\x01\xd0"  # xgetbv
_AVX_ONLY = b"\xb0\x07\x90"  # mov al, 7; nop
_IN_CODE = re.compile(
    rb"(?<=\x31\xc9)\x0f\x01\xd0"  # after "xor ecx, ecx", which chooses XCR0
    rb"|\x0f\x01\xd0(?=\x89\xc0\x48\xc1\xe2\x20)",  # before "mov eax, eax; shl rdx, 32", which joins its halves
    re.DOTALL,
)
"""The instruction where it is one: the same three bytes occur inside of others."""


def without_avx512(package: Path, destination: Path) -> Path:
    """Copies a package and patches its libraries; gives the folder to put on Python's path.

    Raises:
        SystemExit: no library asks for the enabled registers in a known way, so nothing could be masked.
    """
    copy = destination / package.name
    if copy.exists():
        return destination
    aside = destination / f".{package.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(package, aside)
    places = sum(_patch(library) for library in aside.rglob("*.so*"))
    if not places:
        raise SystemExit(f"found no xgetbv in the libraries of {package}: cannot mask AVX-512 there")
    aside.rename(copy)
    return destination


def _patch(library: Path) -> int:
    code, places = _IN_CODE.subn(_AVX_ONLY, library.read_bytes())
    if places:
        library.write_bytes(code)
    return places
