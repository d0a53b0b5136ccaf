"""From IRModules to executables, and the whole pipeline from a partitioned module and a plan to a lowered one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tvm
from tvm import IRModule, relax
from tvm.s_tir import dlight

from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.errors import ToolchainError
from tvm_hquant.gpu_schedule import SumsInRegisters
from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.opaque_functions import legalization
from tvm_hquant.passes.annotate_precision import annotate_precision
from tvm_hquant.passes.apply_schedules import apply_schedules
from tvm_hquant.passes.exact_float_constants import exact_float_constants
from tvm_hquant.passes.insert_casts import insert_casts
from tvm_hquant.passes.lower_layers import lower_layers
from tvm_hquant.passes.plan_memory import plan_memory
from tvm_hquant.passes.realize_quantization import realize_quantization
from tvm_hquant.passes.write_concat_in_place import write_concat_in_place
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.target_spec import TargetSpec

StageObserver = Callable[[str, IRModule], None]
"""Called with the name of a stage and the module after it."""


def build_pipeline(target: Any, schedules: Mapping[str, str] | None = None) -> Any:
    """The build passes for modules whose layers are lowered.

    These are those of TVM's default build pipeline (tvm/relax/pipeline.py), with four differences. Private layer
    functions are inlined first, so that memory is planned over the whole graph. A pass of our own plans it, in blocks that
    tensors of all dtypes share. Reshapes stay reshapes, which the runtime does without copying: TVM's own way there,
    ``RewriteDataflowReshape``, only looks into functions made of blocks. Nothing is fused: every operator that TVM
    legalizes compiles by itself, as in the simulator, with the loops that TVM gives it or with a measured schedule out of
    ``schedules`` (a trace for each function's digest). For a GPU, functions get their threads from TVM's dlight and a rule
    of our own for it; for C source, constants are written so that no digit is lost.
    """
    transform = relax.transform
    kind = target.kind.name
    return tvm.transform.Sequential(
        [
            transform.InlinePrivateFunctions(),
            transform.DeadCodeElimination(),
            *legalization(),
            *([apply_schedules(schedules)] if schedules and kind == "llvm" else []),
            *([dlight.ApplyDefaultSchedule(SumsInRegisters(), dlight.gpu.Fallback())] if kind == "cuda" else []),
            *([exact_float_constants()] if kind == "c" else []),
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            plan_memory(),
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ],
        name="hquant.build",
    )


def build_module(
    mod: IRModule,
    target: Any,
    target_name: str,
    schedules: Mapping[str, str] | None = None,
    checks_arguments: bool = True,
) -> Any:
    """An executable of a module whose layers are lowered.

    Functions that do not check their arguments take half the time to compile, those of many arguments a sixth.

    Raises:
        ToolchainError: TVM cannot generate code for the target.
        TuningError: a measured schedule does not fit its function.
    """
    try:
        with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_assert": not checks_arguments}), target:
            passes = CPU_PIPELINE if target.kind.name == "llvm" else "default"
            return relax.build(
                mod, target=target, relax_pipeline=build_pipeline(target, schedules), tir_pipeline=passes
            )
    except (RuntimeError, ValueError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ToolchainError(f"TVM cannot generate code for {target_name}: {lines[-1]}") from error


def quantization_passes(
    plan: PrecisionPlan, spec: TargetSpec | None, families: Sequence[KernelFamily]
) -> list[tuple[str, Any]]:
    """Stages 3 and 5 to 7 with their names, in order."""
    return [
        ("annotate_precision", annotate_precision(plan, spec)),
        ("insert_casts", insert_casts(plan.scales)),
        ("realize_quantization", realize_quantization(plan)),
        ("lower_layers", lower_layers(families)),
        ("write_concat_in_place", write_concat_in_place(families)),
    ]


def lower(
    mod: IRModule,
    plan: PrecisionPlan,
    spec: TargetSpec | None,
    families: Sequence[KernelFamily],
    observe: StageObserver | None = None,
) -> IRModule:
    """Runs the quantization passes over a partitioned module."""
    for name, stage in quantization_passes(plan, spec, families):
        mod = stage(mod)
        if observe is not None:
            observe(name, mod)
    return mod
