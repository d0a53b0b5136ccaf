"""While an artifact is built: functions that TVM made of opaque layers get measured schedules, where there are some.

Before (a transposed convolution whose weights are no constants)::

    @T.prim_func(private=True)
    def conv2d_transpose(x: T.Buffer((1, 16, 14, 14)), w: T.Buffer((16, 8, 4, 4)), y: T.Buffer((1, 8, 28, 28))):
        ...  # data_dilate, data_pad and kernel_transform into buffers of their own
        for b, c, h, w, dc, dh, dw in T.grid(1, 8, 28, 28, 16, 4, 4):
            with T.sblock("compute"):
                ...

After::

    @T.prim_func(private=True)
    def conv2d_transpose(x: T.Buffer((1, 16, 14, 14)), w: T.Buffer((16, 8, 4, 4)), y: T.Buffer((1, 8, 28, 28))):
        for b, c, h, w in ...:  # tiles; what a tile reads is made beside it
            for dc, dh, dw in T.grid(16, 4, 4):
                for w in T.vectorized(14):
                    ...

A schedule is a *trace* of TVM's MetaSchedule: the instructions of a schedule with what was decided, as JSON
(``tvm/s_tir/schedule/trace.py``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tvm
from tvm import IRModule, s_tir, tirx

from tvm_hquant.errors import TuningError
from tvm_hquant.opaque_functions import function_digest

NO_TRACE = "[[], []]"
"""Leaves a function as it is."""


def apply_schedules(traces: Mapping[str, str]) -> Any:
    """The pass. ``traces`` has the trace of a function by its digest.

    Raises (when run):
        TuningError: a trace does not fit its function.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        scheduled = mod.clone()
        for variable, function in mod.functions_items():
            if isinstance(function, tirx.PrimFunc) and (trace := traces.get(function_digest(function))):
                scheduled[variable] = scheduled_function(function, trace)
        return scheduled

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.apply_schedules")


def trace_text(schedule: Any) -> str:
    """What was done to a schedule, as text that :func:`scheduled_function` takes."""
    return json.dumps(schedule.trace.as_json(), default=_plain)


def _plain(value: Any) -> Any:
    """Containers and numbers of TVM as JSON has them."""
    if hasattr(value, "items"):
        return dict(value.items())
    return value.value if hasattr(value, "value") else list(value)


def scheduled_function(function: Any, trace: str) -> Any:
    """A function after the instructions of a trace.

    Buffers between its loops are shrunk to what a tile needs of them: the pipeline for kernels of this project, which
    allocate what they use, does not do that.

    Raises:
        TuningError: the trace does not fit.
    """
    # A schedule writes over a module that nobody else refers to, and over the given function's body with it.
    module = IRModule({"main": function.with_attr("global_symbol", "main")})
    schedule = s_tir.Schedule(module)
    try:
        s_tir.schedule.Trace.apply_json_to_schedule(json.loads(trace), schedule)
    except (ValueError, TypeError, RuntimeError, s_tir.ScheduleError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TuningError(
            f"a tuning record holds no schedule that fits its function: {lines[-1]}; tune again"
        ) from None
    passes = s_tir.transform
    compacted = tvm.transform.Sequential(
        [
            passes.LowerInitBlock(),
            passes.PlanAndUpdateBufferAllocationLocation(),
            passes.ConvertBlocksToOpaque(),
            passes.CompactBufferAllocation(),
        ]
    )(schedule.mod)
    bare = compacted["main"].without_attr("global_symbol")
    attributes = function.attrs or {}
    return bare.with_attr("global_symbol", attributes["global_symbol"]) if "global_symbol" in attributes else bare
