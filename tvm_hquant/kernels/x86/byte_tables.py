"""Tables of 256 codes on x86: ``vpshufb`` looks a byte up among sixteen, for all bytes of a vector at once.

It takes the lower half of a byte as the place, and gives 0 where the highest bit is set. So for codes below 128 it is asked
with the codes themselves, less 16, less 32, … (saturated, so that negative ones stay negative): a code of 16·j + i gets entry i
of the first j + 1 parts of the table. Where each part holds the exclusive or with the part before it, the exclusive or of what
the code gets is entry 16·j + i. With the highest bit of the codes turned over, the same serves those from 128 on.
Source: Intel 64 and IA-32 Architectures Software Developer's Manual, PSHUFB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, lanes_of
from tvm_hquant.kernels.vector_loops import load

_PART = 16
_HALF = 128
_NAMES = {
    16: "llvm.x86.ssse3.pshuf.b.128",
    32: "llvm.x86.avx2.pshuf.b",
    64: "llvm.x86.avx512.pshuf.b.512",
}


@dataclass(frozen=True)
class ByteTables:
    """Look-ups in vectors of so many bytes."""

    widths: tuple[int, ...]
    instructions: int = 64

    def pack(self, table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """uint8 [256]: the parts of each half, but the first, as what they differ in from the part before."""
        parts = table.reshape(2, _HALF // _PART, _PART)
        return np.concatenate([parts[:, :1], parts[:, 1:] ^ parts[:, :-1]], axis=1).reshape(-1)

    def look_up(self, table: Buffer, codes: Expression) -> Expression:
        """uint8: the entries for a vector of uint8 codes; ``table`` holds what :meth:`pack` gives."""
        width = lanes_of(codes)
        signed = f"int8x{width}"
        step = T.broadcast(T.int8(_PART), width)
        found = None
        for half in range(2):
            places = T.reinterpret(signed, codes ^ T.broadcast(T.uint8(_HALF), width) if half else codes)
            for part in range(_HALF // _PART):
                if part:
                    places = T.bind(T.call_llvm_pure_intrin(signed, "llvm.ssub.sat", places, step))
                entries = self._part(table, half * _HALF + part * _PART, width)
                entry = T.call_llvm_pure_intrin(signed, _NAMES[width], entries, places)
                found = entry if found is None else T.bind(found ^ entry)
        return T.reinterpret(f"uint8x{width}", found)

    def _part(self, table: Buffer, start: int, width: int) -> Expression:
        part = T.reinterpret(f"int8x{_PART}", load(table, start, _PART))
        copies = width // _PART
        # TVM wants no more lanes to come out of a shuffle than go into it.
        return T.bind(part if copies == 1 else T.Shuffle([part] * copies, list(range(_PART)) * copies))
