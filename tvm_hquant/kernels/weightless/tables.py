"""Functions between 8-bit codes where an instruction looks a vector of codes up in a table.

Elsewhere look-ups are made one by one (:mod:`.elementwise`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tvm_hquant.kernels.interface import Array, Kernel, KernelRequest, LayerConstants
from tvm_hquant.kernels.kernel_function import Buffer, kernel_function
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.vector_loops import elements, flat, flat_loop, load, store, vectors
from tvm_hquant.kernels.weightless.elementwise import elementwise_form
from tvm_hquant.kernels.work import work
from tvm_hquant.operators import Unary


class TableVectors(Protocol):
    """Vectors of bytes that are looked up in a table.

    Attributes:
        widths: bytes of a vector, the least first.
        instructions: of a vector.
    """

    @property
    def widths(self) -> Sequence[int]: ...
    @property
    def instructions(self) -> int: ...

    def pack(self, table: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """uint8 [256]: the table as :meth:`look_up` reads it."""

    def look_up(self, table: Buffer, codes: Expression) -> Expression:
        """uint8: the entries for a vector of uint8 codes."""


def table_kernel(
    request: KernelRequest, tables: TableVectors, processor: Processor = ASSUMED_PROCESSOR
) -> Kernel | None:
    """One loop over the flat tensor; None for other operators and storages, for tensors that fill no vector, and for those that
    are written over their input if all vectors overlap: some codes would be looked up twice."""
    if not isinstance(request.operator, Unary) or (*request.inputs, request.output) != ("uint8", "uint8"):
        return None
    length = elements(request.operator.shape)
    reads_once = request.overwritten is not None
    fitting = [width for width in tables.widths if width <= length and not (reads_once and length % width)]
    if not fitting or (reads_once and request.placement is not None):
        return None
    width = fitting[-1]
    form = elementwise_form(request)
    assert form is not None

    def pack(constants: LayerConstants) -> tuple[Array, ...]:
        (table,) = form.pack(constants)
        return (tables.pack(table),)

    def emit(inputs: Sequence[Buffer], constants: Sequence[Buffer], output: Buffer) -> None:
        source, target = flat(inputs[0]), flat(output)
        in_all = work(request, vectors(length, width) * tables.instructions)
        with flat_loop(length, width, in_all, processor) as start:
            store(target, start, tables.look_up(constants[0], load(source, start, width)), width)

    return Kernel(request, f"common.{form.name}[{width}]", kernel_function(request, form.constants, emit), pack)
