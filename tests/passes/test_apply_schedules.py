"""Functions that TVM made get the schedules of tuning records; others stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import IRModule, s_tir
from tvm.ir import assert_structural_equal
from tvm.script import ir as I
from tvm.script import tirx as T

from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.errors import TuningError
from tvm_hquant.opaque_functions import function_digest
from tvm_hquant.passes.apply_schedules import apply_schedules, trace_text


@I.ir_module(s_tir=True)
class Before:
    @T.prim_func(s_tir=True)
    def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
        for i in range(64):
            with T.sblock("double"):
                at = T.axis.spatial(64, i)
                y[at] = x[at] * T.float32(2)

    @T.prim_func(s_tir=True)
    def halve(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
        for i in range(64):
            with T.sblock("halve"):
                at = T.axis.spatial(64, i)
                y[at] = x[at] * T.float32(0.5)


@I.ir_module(s_tir=True)
class Expected:
    @T.prim_func(s_tir=True)
    def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
        for outer in range(8):
            for inner in T.vectorized(8):
                with T.sblock("double"):
                    T.reads(x[outer * 8 + inner])
                    T.writes(y[outer * 8 + inner])
                    y[outer * 8 + inner] = x[outer * 8 + inner] * T.float32(2)

    @T.prim_func(s_tir=True)
    def halve(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")) -> None:
        for i in range(64):
            with T.sblock("halve"):
                at = T.axis.spatial(64, i)
                y[at] = x[at] * T.float32(0.5)


def _trace() -> str:
    """Vectors of eight for ``double``."""
    module = IRModule({"main": Before["double"].with_attr("global_symbol", "main")})
    schedule = s_tir.Schedule(module)
    (loop,) = schedule.get_loops(schedule.get_sblock("double"))
    _, inner = schedule.split(loop, [8, 8])
    schedule.vectorize(inner)
    return trace_text(schedule)


def _run(mod: IRModule, name: str) -> np.ndarray:
    x = tvm.runtime.tensor(np.arange(64, dtype=np.float32))
    y = tvm.runtime.tensor(np.zeros(64, np.float32))
    tvm.compile(mod, target="llvm", tir_pipeline=CPU_PIPELINE)[name](x, y)
    return y.numpy()


def test_only_named_functions_change() -> None:
    """By their digest, whatever they are called."""
    after = apply_schedules({function_digest(Before["double"]): _trace()})(Before)
    assert_structural_equal(after, Expected)
    assert all(np.array_equal(_run(after, name), _run(Before, name)) for name in ("double", "halve"))


def test_trace_of_another_function_is_an_error() -> None:
    """It names blocks that the function does not have."""
    with pytest.raises(TuningError, match="tune again"):
        apply_schedules({function_digest(Before["halve"]): _trace()})(Before)
