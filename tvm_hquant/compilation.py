"""From IRModules to executables, and the whole pipeline from a partitioned module and a plan to a lowered one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm
from tvm import IRModule, relax

from tvm_hquant.errors import ToolchainError
from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.passes.annotate_precision import annotate_precision
from tvm_hquant.passes.insert_casts import insert_casts
from tvm_hquant.passes.lower_layers import lower_layers
from tvm_hquant.passes.realize_quantization import realize_quantization
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.target_spec import TargetSpec

StageObserver = Callable[[str, IRModule], None]
"""Called with the name of a stage and the module after it."""


def build_pipeline() -> Any:
    """TVM's default build pipeline over modules whose layers are lowered.

    Private layer functions are inlined first, so that memory is planned over the whole graph. Nothing is fused: every
    operator that TVM legalizes compiles by itself, as in the simulator.
    """
    return tvm.transform.Sequential(
        [
            relax.transform.InlinePrivateFunctions(),
            relax.transform.DeadCodeElimination(),
            relax.pipeline.default_build_pipeline(),
        ],
        name="hquant.build",
    )


def build_module(mod: IRModule, target: Any) -> Any:
    """An executable of a module whose TIR functions are finished.

    Raises:
        ToolchainError: TVM's code generator refuses the target.
    """
    try:
        with tvm.transform.PassContext(opt_level=3):
            return relax.build(mod, target=target, relax_pipeline=relax.pipeline.default_build_pipeline())
    except tvm.error.TVMError as error:  # pragma: no cover - depends on TVM's build
        raise ToolchainError(f"TVM cannot generate code for {target}: {_last_line(error)}") from error


def quantization_passes(
    plan: PrecisionPlan, spec: TargetSpec | None, families: Sequence[KernelFamily]
) -> list[tuple[str, Any]]:
    """Stages 3 and 5 to 7 with their names, in order."""
    return [
        ("annotate_precision", annotate_precision(plan, spec)),
        ("insert_casts", insert_casts(plan.scales)),
        ("realize_quantization", realize_quantization(plan)),
        ("lower_layers", lower_layers(families)),
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


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
