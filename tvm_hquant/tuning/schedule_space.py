"""Schedules that TVM's MetaSchedule proposes for a function.

MetaSchedule (Shao et al., *Tensor Program Optimization with Probabilistic Programs*, NeurIPS 2022) builds a space of
schedules by rules that look at each block, and samples what the rules leave open: tile sizes, caches for sums, how far loops
are unrolled. Of its rules for CPUs (``ScheduleRule.create("llvm")``) those are used that leave the order of a sum as it is, so
that a schedule changes no bit: inlining, tiling, vectors, threads. ``AddRFactor``, which cuts a sum into several, is not among
them, and tiling has one level for all axes of a sum (``SSRS``, not ``SSRSRS``). ``RandomComputeLocation`` is not either: for
some samples its proofs take minutes, and a trace with it may not apply again; a transposed convolution gets as fast without.

Whatever copies a module through JSON ends the process with a segmentation fault where tvm-ffi is 0.1.15 (``tvm.ir.save_json``
of any expression, even an ``IntImm``; with 0.1.14 it works): the mutator ``MutateComputeLocation``, which is a default of every
LLVM target, so that ``post-order-apply`` without rules of its own ends in ``TuneContext``; the searches ``replay-trace`` and
``evolutionary``; builders and runners in processes; ``JSONDatabase``. The search ``replay-func`` samples the space anew for
every schedule and copies nothing.
"""

from __future__ import annotations

import json
from typing import Any

import tvm
from tvm import IRModule
from tvm.s_tir import meta_schedule

from tvm_hquant.opaque_functions import function_digest
from tvm_hquant.passes.apply_schedules import NO_TRACE, scheduled_function, trace_text

_MOST_VECTOR = 64
_UNROLL_STEPS = [0, 16, 64, 512]
_JOBS_OF_A_CORE = 16
_SAMPLES = 2
"""Samples for each schedule that is wanted: some come twice."""


def sampled_traces(script: str, target: str, cores: int, count: int) -> list[str]:
    """Traces of different schedules for a function, each applied once to see that it fits.

    Args:
        script: the function as TVMScript.
        target: TVM's target as JSON.
        cores: that share the work of a function; on one core no loop is given to threads.
        count: of traces at most; small functions have fewer schedules.
    """
    function = tvm.script.from_source(script)
    module = IRModule({"main": function.with_attr("global_symbol", "main")})
    described = tvm.target.Target({**json.loads(target), "num-cores": cores})
    context = _context(module, described, cores)
    context.pre_tuning(_SAMPLES * count, _SAMPLES * count, context.generate_design_space())
    found: dict[str, str] = {}
    for candidate in context.generate_measure_candidates() or ():
        trace = trace_text(candidate.sch)
        found.setdefault(function_digest(scheduled_function(function, trace)), trace)
    found.pop(function_digest(scheduled_function(function, NO_TRACE)), None)
    return list(found.values())[:count]


def _context(module: IRModule, target: Any, cores: int) -> Any:
    """What MetaSchedule calls the context of a tuning task, with rules of our choice."""
    rules, processors = meta_schedule.schedule_rule, meta_schedule.postproc
    generator = meta_schedule.space_generator.PostOrderApply(
        sch_rules=[
            rules.InlineConstantScalars(),
            rules.AutoInline(
                into_producer=False,
                into_consumer=True,
                inline_const_tensor=True,
                disallow_if_then_else=True,
                require_injective=True,
                require_ordered=True,
                disallow_op=["tirx.exp"],
            ),
            rules.MultiLevelTiling(
                structure="SSRS",
                max_innermost_factor=_MOST_VECTOR,
                reuse_write=rules.ReuseType(req="may", levels=[1, 2], scope="global"),
            ),
            rules.ParallelizeVectorizeUnroll(
                max_jobs_per_core=_JOBS_OF_A_CORE if cores > 1 else -1,
                max_vectorize_extent=_MOST_VECTOR,
                unroll_max_steps=_UNROLL_STEPS,
                unroll_explicit=True,
            ),
        ],
        postprocs=[
            processors.DisallowDynamicLoop(),
            processors.RewriteParallelVectorizeUnroll(),
            processors.RewriteReductionBlock(),
        ],
        mutator_probs={},
    )
    strategy = meta_schedule.search_strategy.ReplayFunc()
    # The class's own constructor imports the tensor instructions of all GPUs first, which takes 20 s.
    create = tvm.get_global_func("s_tir.meta_schedule.TuneContext")
    context = create(module, target, generator, strategy, "main", 1, 1, None)
    tvm.get_global_func("s_tir.meta_schedule.TuneContextInitialize")(context)
    return context
