"""The module that the simulator compiles: protects that it holds every kernel once and no values of any plan."""

from __future__ import annotations

import tvm

from tests.planned_models import host_spec, named_plan, partitioned, shared_session
from tvm_hquant.kernels.interface import Kernel
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.passes.simulate_quantization import simulate_quantization
from tvm_hquant.relax_ir.kernel_calls import is_view, kernel_symbol


def kernels_of(model: str, name: str) -> list[Kernel]:
    """The kernels of all steps of a plan, one for each step."""
    session, plan = shared_session(model), named_plan(model, name)
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    families = families_for_target(host_spec().instruction_sets)
    requests = [step.request for step in program.steps if step.request is not None]
    return [select_kernel(families, request) for request in requests if not is_view(request)]


def test_one_function_per_kernel_and_per_opaque_layer() -> None:
    """Kernels that several candidates share are compiled once; what TVM legalizes can be called by its own name."""
    kernels = kernels_of("branches", "a8w8") + kernels_of("branches", "int8")
    symbols = {kernel_symbol(kernel) for kernel in kernels}
    assert len(symbols) < len(kernels)
    mod = simulate_quantization(kernels)(partitioned("branches"))
    names = {variable.name_hint for variable in mod.get_global_vars()}
    assert names == {*symbols, "power_0"}
    for symbol in symbols:
        assert mod[symbol].attrs["global_symbol"] == symbol
    assert mod["power_0"].attrs["global_symbol"] == "power_0"
    tvm.ir.assert_structural_equal(
        mod["power_0"].without_attr("global_symbol"), partitioned("branches")["power_0"].without_attr("global_symbol")
    )


def test_no_value_of_a_plan_is_compiled_in() -> None:
    """Two calibrations of one model, so other scales and zero points everywhere, ask for the very same kernels."""
    session = shared_session("residual")
    plan = named_plan("residual", "a8w8")
    doubled = {
        tensor: {
            codes: type(f)(f.dtype, 2 * f.scale, (f.q_min + f.zero_point) // 2, f.q_min, f.q_max)
            for codes, f in formats.items()
        }
        for tensor, formats in plan.scales.items()
    }
    programs = [
        session.builder.program(plan.precisions(), scales, plan.layer_weights) for scales in (plan.scales, doubled)
    ]
    first, second = ([step.request for step in program.steps] for program in programs)
    assert first == second
    assert session.engine.compile([programs[0]]) >= 0
    assert session.engine.compile([programs[1]]) == 0


def test_the_partitioned_module_is_left_alone() -> None:
    """The pass makes a new module."""
    before = partitioned("branches")
    names = {v.name_hint for v in before.get_global_vars()}
    simulate_quantization(kernels_of("branches", "a8w8"))(before)
    assert {v.name_hint for v in before.get_global_vars()} == names
    assert "global_symbol" not in before["power_0"].attrs
