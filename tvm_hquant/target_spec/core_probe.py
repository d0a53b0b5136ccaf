"""Measures a core of this machine: its clock under load, and how many vector multiply-adds it starts in a cycle.

CPU flags do not tell: of processors with AVX-512 some start two 512-bit instructions a cycle and some, that have pipes of
256 bits, one. Two short loops do. One is a chain of rotations and additions that wait for each other, a cycle each on every
processor at hand, and counts cycles; the other has multiply-adds that wait for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from tvm_hquant.kernels.primitives import STACK, LlvmPrimitives
from tvm_hquant.kernels.vector_loops import load, store

_ACCUMULATORS = 12
"""Sums that hide the latency of two pipes and leave four of 16 registers."""
_ITERATIONS = 500
_UNROLLED = 16
_REPEATS = 200
"""The fastest call counts: what the machine does besides only makes others slower."""


@dataclass(frozen=True)
class Core:
    """What was measured.

    Attributes:
        clock_ghz: cycles a nanosecond.
        vector_pipes: multiply-adds of whole float32 vectors that it starts in a cycle.
    """

    clock_ghz: float
    vector_pipes: int


def measure_core(target: Any, lanes: int) -> Core:
    """Measures for a tenth of a second or so, most of which is compiling, on one core.

    Args:
        target: a ``tvm.target.Target`` that this machine can run.
        lanes: float32 values in a vector.
    """
    library = tvm.tirx.build(tvm.IRModule({"chain": _chain(), "multiply_adds": _multiply_adds(lanes)}), target=target)
    word = tvm.runtime.tensor(np.ones(1, np.int32))
    vectors = tvm.runtime.tensor(np.ones((_ACCUMULATORS + 2) * lanes, np.float32))
    steps = 2 * _UNROLLED * _ITERATIONS
    nanoseconds = _fastest(library, "chain", word) / steps
    products = _ACCUMULATORS * _ITERATIONS * nanoseconds / _fastest(library, "multiply_adds", vectors)
    return Core(1 / nanoseconds, max(1, round(products)))


def _fastest(library: Any, name: str, argument: Any) -> float:
    """Nanoseconds of a call."""
    return 1e9 * float(min(library.time_evaluator(name, tvm.cpu(), number=1, repeat=_REPEATS)(argument).results))


def _chain() -> Any:
    """word ← rotate(word) + 1, over and over."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        word = T.arg("word", T.buffer((1,), "int32"))
        T.func_attr({"tirx.noalias": True, "global_symbol": "chain"})
        value = T.alloc_buffer((1,), "int32", scope=STACK)
        T.buffer_store(value, word[0], [0])
        with T.serial(_ITERATIONS):
            for _ in range(_UNROLLED):
                rotated = T.call_llvm_pure_intrin("int32", "llvm.fshl", value[0], value[0], T.int32(7))
                T.buffer_store(value, rotated + T.int32(1), [0])
        T.buffer_store(word, value[0], [0])
    return builder.get()


def _multiply_adds(lanes: int) -> Any:
    """Sums of the last two vectors' products, which stay in registers."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        vectors = T.arg("vectors", T.buffer(((_ACCUMULATORS + 2) * lanes,), "float32"))
        T.func_attr({"tirx.noalias": True, "global_symbol": "multiply_adds"})
        sums = [T.alloc_buffer((lanes,), "float32", scope=STACK) for _ in range(_ACCUMULATORS)]
        for number, total in enumerate(sums):
            store(total, 0, load(vectors, number * lanes, lanes), lanes)
        first, second = (T.bind(load(vectors, (_ACCUMULATORS + i) * lanes, lanes)) for i in range(2))
        with T.serial(_ITERATIONS):
            for total in sums:
                store(total, 0, LlvmPrimitives().fma(first, second, load(total, 0, lanes)), lanes)
        for number, total in enumerate(sums):
            store(vectors, number * lanes, load(total, 0, lanes), lanes)
    return builder.get()
