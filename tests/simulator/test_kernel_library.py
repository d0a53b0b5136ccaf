"""Libraries of the simulator's kernels."""

from __future__ import annotations

from typing import Any

from tvm import IRModule

from tests.planned_models import host_spec
from tvm_hquant.compilation import build_module
from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import Concat
from tvm_hquant.passes.simulate_quantization import simulate_quantization
from tvm_hquant.simulator.kernel_library import built_kernels


def test_kernels_do_not_check_their_arguments() -> None:
    """The simulator gives each the arrays that it is for, and the checks of many arguments take most of the time to compile.
    What is deployed checks."""
    spec = host_spec()
    request = KernelRequest(Concat(((1, 2, 2, 16),) * 8, 3), ("uint8",) * 8, "uint8")
    kernel = select_kernel(families_for_target(spec.instruction_sets), request)
    deployed = build_module(simulate_quantization([kernel])(IRModule()), spec.tvm_target(), "this machine")
    assert "Mismatched" in _code(deployed)
    assert "Mismatched" not in _code(built_kernels([kernel], spec.tvm_target()))


def _code(executable: Any) -> str:
    modules = [executable.mod, *executable.mod.imports]
    return "".join(str(module.inspect_source("ll")) for module in modules if str(module.kind) == "llvm")
