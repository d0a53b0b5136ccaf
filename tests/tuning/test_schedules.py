"""Schedules for what TVM computes: a schedule changes how fast a function is, never a bit of what it computes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import tvm
from tvm import IRModule, s_tir
from tvm.script import tirx as T

from tests.onnx_models import node, onnx_model, random_weights
from tvm_hquant import api
from tvm_hquant.opaque_functions import function_digest, load_opaque_functions
from tvm_hquant.passes.apply_schedules import scheduled_function, trace_text
from tvm_hquant.runtime import Artifact
from tvm_hquant.tuning.bench import TimedFunction, open_bench
from tvm_hquant.tuning.records import ScheduleRecord, append_records, read_records
from tvm_hquant.tuning.schedule_space import sampled_traces
from tvm_hquant.tuning.schedules import tune_schedules
from tvm_hquant.verification import verify_artifact


@cache
def _result() -> api.QuantizationResult:
    """A transposed convolution, whose weights are no constants, between two layers that have kernels."""
    weights = {**random_weights(w=(4, 4, 3, 3)), "shape": np.array([4, 8, 4, 4])}
    nodes = [
        node("Conv", "x w", "c"),
        node("Reshape", "flat shape", "t"),
        node("ConvTranspose", "c t", "s", strides=[2, 2]),
        node("Relu", "s", "y"),
    ]
    model = onnx_model(nodes, weights, {"x": (1, 4, 8, 8), "flat": (1, 512)})
    return api.plan_without_search(api.open_session(model, "host"), precision="float32")


@cache
def _untuned() -> Artifact:
    return api.compile(_result())


def crashing_sampler(*_: object) -> list[str]:
    """Ends its process as a fault in TVM's code does."""
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def reversing_sampler(script: str, *_: object) -> list[str]:
    """A schedule that adds products in another order: input channels last."""
    module = IRModule({"main": tvm.script.from_source(script).with_attr("global_symbol", "main")})
    schedule = s_tir.Schedule(module)
    *_outer, channels, rows, columns = schedule.get_loops(schedule.get_sblock("compute"))
    schedule.reorder(columns, rows, channels)
    return [trace_text(schedule)]


@T.prim_func(private=True, s_tir=True)
def two_outputs(x: T.Buffer((8, 9, 10), "float32"), total: T.Buffer((1,), "float32"), same: T.Buffer((8,), "float32")):
    """A sum, and a copy behind it."""
    for i, j, k, m in T.grid(1, 8, 9, 10):
        with T.sblock("compute"):
            at, p, q, r = T.axis.remap("SRRR", [i, j, k, m])
            with T.init():
                total[at] = T.float32(0)
            total[at] = total[at] + x[p, q, r]
    for i in range(8):
        with T.sblock("copy"):
            at = T.axis.spatial(8, i)
            same[at] = x[at, 0, 0]


def _same_outputs(one: Artifact, other: Artifact) -> bool:
    sample = {
        e["name"]: np.random.default_rng(3).normal(size=e["shape"]).astype(e["dtype"]) for e in one.manifest["inputs"]
    }
    return all(np.array_equal(a, b) for a, b in zip(one.run(sample).values(), other.run(sample).values(), strict=True))


def test_measured_schedule_is_compiled_and_changes_no_bit(tmp_path: Path) -> None:
    """From the artifact over MetaSchedule and the file of records to another artifact."""
    result, untuned = _result(), _untuned()
    (function,) = load_opaque_functions(untuned.folder)
    assert function.layers == ("conv2d_transpose_0",)
    (record,), left = tune_schedules(untuned, open_bench(untuned), count=2, repeat=1)
    assert left == ()
    assert (record.function, record.name) == (function.digest, "conv2d_transpose")
    # Which of two samples is fastest is the machine's affair: the last one goes into the file.
    trace = sampled_traces(function.script, str(result.spec.tvm_target()), 1, 2)[-1]
    append_records(tmp_path / "tuned.jsonl", [record, replace(record, trace=trace)])
    tuned = api.compile(result, tuning_records=tmp_path / "tuned.jsonl")
    assert tuned.manifest["files"]["model.so"] != untuned.manifest["files"]["model.so"]
    assert _same_outputs(untuned, tuned)
    report = verify_artifact(tuned)
    assert report.holds
    assert [check.layer for check in report.outside_contract] == ["conv2d_transpose_0"]


def test_sampled_schedules_differ_and_leave_the_function_alone() -> None:
    """A schedule writes over what nobody else refers to; the second one must find the function as it was."""
    (function,) = load_opaque_functions(_untuned().folder)
    original = tvm.script.from_source(function.script)
    traces = sampled_traces(function.script, str(tvm.target.Target("llvm")), 2, 4)
    digests = {function_digest(scheduled_function(original, trace)) for trace in traces}
    assert len(traces) == 4 == len(digests)
    assert function_digest(original) == function.digest not in digests


def test_fault_of_a_rule_ends_only_its_own_process() -> None:
    """The function is left as it is, and said to be."""
    untuned = _untuned()
    records, (left,) = tune_schedules(untuned, open_bench(untuned), count=2, repeat=1, sampler=crashing_sampler)
    assert records == ()
    assert left.function.name == "conv2d_transpose"
    assert "ended its process" in left.reason


def test_schedule_that_sums_in_another_order_is_dropped() -> None:
    """Its bits are not those that the simulator computes, however fast it is."""
    untuned = _untuned()
    (record,), _ = tune_schedules(untuned, open_bench(untuned), count=1, repeat=1, sampler=reversing_sampler)
    assert record.trace == ""
    assert record.microseconds == record.expected_microseconds


def test_every_output_is_compared() -> None:
    """Not the last one alone: here the first is a sum, in another order after the schedule."""
    bench, function = open_bench(_untuned()), two_outputs.without_attr("global_symbol")
    (trace,) = reversing_sampler(function.script())
    x = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)

    def bits(timed: tvm.tirx.PrimFunc) -> bytes:
        arrays = [bench.tensor(array) for array in (x, np.zeros(1, np.float32), np.zeros(8, np.float32))]
        return TimedFunction(bench.library({"timed": timed}), "timed", [arrays]).bits()

    before, after = bits(function), bits(scheduled_function(function, trace))
    assert before[-32:] == after[-32:] == x[:, 0, 0].tobytes()
    assert before != after


def test_both_kinds_of_records_share_a_file(tmp_path: Path) -> None:
    """In order, as they were written."""
    record = ScheduleRecord("0123456789abcdef", "sort", "this", "[[], []]", 1.0, 2.0)
    append_records(tmp_path / "tuned.jsonl", [record])
    assert read_records(tmp_path / "tuned.jsonl") == (record,)
