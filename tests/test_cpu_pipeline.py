"""The shorter pipeline is TVM's own for everything that kernels contain: LLVM must be given the same code."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tvm import relax, tirx
from tvm.tirx.build import codegen_build, split_host_device_mods
from tvm.tirx.compilation_pipeline import get_tir_pipeline

from tests.planned_models import shared_session
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.precision import parse_precision
from tvm_hquant.relax_ir.kernel_calls import is_view, kernel_symbol
from tvm_hquant.target_spec import load_target_spec


def generated_code(mod: Any, target: Any, pipeline: str) -> dict[str, str]:
    """LLVM's text of every function, without the numbers of debugging records and attributes."""
    passes, finish_host, _ = get_tir_pipeline(pipeline)
    host, _ = split_host_device_mods(passes(mod))
    text = codegen_build(finish_host()(host), target).inspect_source("ll")
    bodies = [part[: part.index("\n}")] for part in re.split(r"\n(?=define )", text)[1:]]
    named = {body.partition("@")[2].partition("(")[0]: body for body in bodies}
    return {name: re.sub(r"[!#]\d+", "", body) for name, body in named.items()}


@pytest.mark.parametrize("spec_name", ["x86-64-avx512-bf16", "cortex-a72", "portable-cpu"])
def test_code_is_that_of_tvms_pipeline(spec_name: str) -> None:
    """No pass was left out that would have changed a kernel."""
    session, spec = shared_session("branches"), load_target_spec(spec_name)
    families, target = families_for_target(spec.instruction_sets), spec.tvm_target()
    builder = relax.BlockBuilder()
    symbols = set()
    for name in ("float32", "a8w8", "bfloat16"):
        for step in session.program(session.uniform(parse_precision(name))).steps:
            if step.request is None or is_view(step.request):
                continue
            kernel = select_kernel(families, step.request)
            if (symbol := kernel_symbol(kernel)) not in symbols:
                symbols.add(symbol)
                builder.add_func(kernel.function.with_attr("global_symbol", symbol), symbol)
    mod = tirx.transform.BindTarget(target.with_host(target))(builder.get())
    ours = generated_code(mod, target, CPU_PIPELINE)
    assert ours == generated_code(mod, target, "default")
    assert symbols <= {name.removeprefix("__tvm_ffi_").strip('"') for name in ours}
