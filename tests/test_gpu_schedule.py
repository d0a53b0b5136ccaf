"""The schedule of sums on GPUs: protects that a sum stays with one thread, in order; other functions are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import tvm
from tvm.s_tir import dlight
from tvm.script import ir as I
from tvm.script import tirx as T

from tvm_hquant.cuda_compilation import kernel_source, source_kept
from tvm_hquant.gpu_schedule import SumsInRegisters
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.operators import (
    AveragePool2D,
    BatchMatmul,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Softmax,
    Window,
)

TARGET = tvm.target.Target({"kind": "cuda", "arch": "sm_80", "host": {"kind": "llvm"}})


@I.ir_module
class Before:
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((40, 8), "float32"), y: T.Buffer((40,), "float32")):
        T.func_attr({"tirx.noalias": True})
        total = T.sblock_alloc_buffer((40,))
        for i, k in T.grid(40, 8):
            with T.sblock("sum"):
                v_i, v_k = T.axis.remap("SR", [i, k])
                with T.init():
                    total[v_i] = T.float32(0)
                total[v_i] = total[v_i] + x[v_i, v_k]
        for i in range(40):
            with T.sblock("mean"):
                v_i = T.axis.spatial(40, i)
                y[v_i] = total[v_i] * T.float32(0.125)


@I.ir_module
class Expected:
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((40, 8), "float32"), y: T.Buffer((40,), "float32")):
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        total = T.sblock_alloc_buffer((40,), scope="local")
        for block in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(128, thread="threadIdx.x"):
                with T.sblock("sum_init"):
                    v_i = T.axis.spatial(40, block * 128 + thread)
                    T.where(block * 128 + thread < 40)
                    T.reads()
                    T.writes(total[v_i])
                    total[v_i] = T.float32(0)
                for k in range(8):
                    with T.sblock("sum_update"):
                        v_i = T.axis.spatial(40, block * 128 + thread)
                        v_k = T.axis.reduce(8, k)
                        T.where(block * 128 + thread < 40)
                        T.reads(total[v_i], x[v_i, v_k])
                        T.writes(total[v_i])
                        total[v_i] = total[v_i] + x[v_i, v_k]
                with T.sblock("mean"):
                    v_i = T.axis.spatial(40, thread)
                    T.where(thread < 40)
                    T.reads(total[v_i])
                    T.writes(y[v_i])
                    y[v_i] = total[v_i] * T.float32(0.125)


@I.ir_module
class ReadsNeighbours:
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((40, 8), "float32"), y: T.Buffer((40,), "float32")):
        total = T.sblock_alloc_buffer((40,))
        for i, k in T.grid(40, 8):
            with T.sblock("sum"):
                v_i, v_k = T.axis.remap("SR", [i, k])
                with T.init():
                    total[v_i] = T.float32(0)
                total[v_i] = total[v_i] + x[v_i, v_k]
        for i in range(40):
            with T.sblock("turned"):
                v_i = T.axis.spatial(40, i)
                y[v_i] = total[39 - v_i]


def scheduled(mod: tvm.IRModule, *rules: Any) -> tvm.IRModule:
    with TARGET:
        return dlight.ApplyDefaultSchedule(*rules)(mod)


def test_sum_and_end_are_one_launch() -> None:
    """A thread makes one element: its sum in a register, in ascending order, then what becomes of it."""
    tvm.ir.assert_structural_equal(scheduled(Before, SumsInRegisters()), Expected)


def test_sums_that_others_read_are_left_alone() -> None:
    """A sum in a register is there for its own thread only."""
    tvm.ir.assert_structural_equal(scheduled(ReadsNeighbours, SumsInRegisters()), ReadsNeighbours)


WINDOW = Window((3, 3), (2, 2), (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("operator", "inputs", "launches"),
    [
        (AveragePool2D((1, 9, 8, 20), WINDOW), ("uint8",), 1),
        (AveragePool2D((2, 8, 8, 64), Window((8, 8), (8, 8))), ("float16",), 1),
        (LocalResponseNormalization((1, 7, 7, 33), 5, 1e-4, 0.75, 1.0), ("float32",), 1),
        (BatchMatmul(((2, 5, 6), (2, 6, 7)), ((0, 1, 2), (0, 1, 2)), (0, 1, 2)), ("float32", "float32"), 1),
        (MaxPool2D((1, 9, 8, 20), WINDOW), ("uint8",), 1),
        (Softmax((5, 33), 1), ("float32",), 4),
        (GroupNormalization((5, 33), 1, 1, 1e-5), ("float32",), 5),
    ],
)
def test_launches_of_kernels(operator: Any, inputs: tuple[Any, ...], launches: int) -> None:
    """Pools, normalization and products of matrices launch once; sums that all elements read stay launches."""
    kernel = ReferenceFamily("cuda").kernel(KernelRequest(operator, inputs, inputs[0]))
    assert kernel is not None
    mod = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    with source_kept():
        code = kernel_source(tvm.compile(scheduled(mod, SumsInRegisters(), dlight.gpu.Fallback()), target=TARGET).mod)
    # Each is declared, and then defined.
    assert code.count('extern "C" __global__') == 2 * launches
