"""Loops without remainders, for kernels that walk over memory in vectors.

A length that the vector does not divide is covered by letting the last vector overlap the one before it, which stores the
same values twice; a length below one vector takes the largest power of two of lanes that fits. So each loop has one
body, which keeps compiling quick.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import Expression, vector_type
from tvm_hquant.kernels.processor import Processor, Work
from tvm_hquant.operators import Shape

MOVE = 2
"""Instructions that move a vector."""
ARITHMETIC = 12
"""Instructions that compute a vector of float32, as a rule: loads, conversions, a multiply-add, limits, a store."""


def elements(shape: Shape) -> int:
    """How many elements an array of that shape has."""
    count = 1
    for size in shape:
        count *= size
    return count


def shape_of(buffer: Buffer) -> Shape:
    """The shape of a buffer, as integers."""
    return tuple(int(size) for size in buffer.shape)


def flat(buffer: Buffer) -> Buffer:
    """The memory of a buffer with one axis."""
    return T.decl_buffer((elements(shape_of(buffer)),), buffer.dtype, data=buffer.data)


def fitting_lanes(length: int, lanes: int) -> int:
    """``lanes``, or the largest power of two that is not above a shorter ``length``."""
    while lanes > length:
        lanes //= 2
    return max(lanes, 1)


def load(buffer: Buffer, start: Expression, lanes: int) -> Expression:
    """``lanes`` neighbours of a flat buffer."""
    return buffer[start] if lanes == 1 else buffer.vload([start], vector_type(buffer.dtype, lanes))


def store(buffer: Buffer, start: Expression, value: Expression, lanes: int) -> None:
    """Stores ``value`` into ``lanes`` neighbours of a flat buffer."""
    T.buffer_store(buffer, value, [start if lanes == 1 else T.ramp(start, 1, lanes)])


def prefetch(buffer: Buffer, index: Expression, level: int = 1) -> None:
    """Asks for the cache line of an element of a flat buffer, which is read or written later.

    ``level``: the cache that it comes to. The index may lie behind the buffer: an address that nothing has does no harm.
    """
    locality = 4 - level
    intrinsic = T.call_llvm_intrin(
        "void", "llvm.prefetch", T.address_of(buffer[index]), T.int32(0), T.int32(locality), T.int32(1)
    )
    T.evaluate(intrinsic)


def vectors(length: int, lanes: int) -> int:
    """How many vectors cover ``length`` elements."""
    return -(-length // lanes)


def vector_start(index: Expression, length: int, lanes: int) -> Expression:
    """Where the vector of that index starts; the last one is moved back to end with the elements."""
    return index * lanes if length % lanes == 0 else T.min(index * lanes, length - lanes)


@contextmanager
def vector_loop(length: int, lanes: int) -> Iterator[Expression]:
    """A serial loop over the starts of the vectors that cover ``length`` elements. ``lanes`` must not exceed it."""
    if length == lanes:
        yield T.int32(0)
        return
    with T.serial(vectors(length, lanes)) as index:
        yield T.bind(vector_start(index, length, lanes))


@contextmanager
def flat_loop(length: int, lanes: int, work: Work, processor: Processor) -> Iterator[Expression]:
    """As :func:`vector_loop`, shared out to threads where a kernel has ``work`` enough (:mod:`tvm_hquant.kernels.work`).

    Only where ``lanes`` does not divide ``length`` it comes to some elements more than once.
    """
    count = vectors(length, lanes)
    if not processor.shares(work):
        with vector_loop(length, lanes) as start:
            yield start
        return
    inner = vectors(count, processor.fewest_items)
    with T.parallel(vectors(count, inner)) as item:
        first = T.bind(item * inner)
        with T.serial(inner if count % inner == 0 else T.min(inner, count - first)) as index:
            yield T.bind(vector_start(first + index, length, lanes))


def row_loop(rows: int, work: Work, processor: Processor) -> Any:
    """A loop over rows, shared out to threads where a kernel has ``work`` enough."""
    return T.parallel(rows) if rows > 1 and processor.shares(work) else T.serial(rows)


def thread_count() -> Expression:
    """Threads that share a parallel loop while the kernel runs, of which a target spec knows nothing."""
    return T.bind(T.call_packed("runtime.NumThreads"))
