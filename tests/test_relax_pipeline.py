"""The pipeline inside ``tvm.compile``: protects the way in for people who have a build of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

import tvm_hquant as hq
from tests.planned_models import host_spec, named_plan, one_sample, partitioned, shared_session, simulated
from tests.small_models import residual_module
from tvm_hquant.errors import PlanError
from tvm_hquant.relax_pipeline import PIPELINE_NAME, hquant_pipeline


def compiled_outputs(mod: tvm.IRModule, *inputs: Any) -> Any:
    """The output of a module that ``tvm.compile`` makes with the pipeline's name alone."""
    executable = tvm.compile(mod, target=host_spec().tvm_target(), relax_pipeline="hquant")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](*(tvm.runtime.tensor(a) for a in inputs)).numpy()


@pytest.mark.parametrize("prepared", [True, False], ids=["partitioned", "as imported"])
def test_compile_with_the_pipeline_gives_what_was_simulated(prepared: bool) -> None:
    """Weights, plan and spec ride on the module; preparing it first or leaving that to the pipeline is the same."""
    mod = partitioned("residual") if prepared else residual_module()
    carrying = hq.attach_plan(mod, named_plan("residual", "mixed"), host_spec())
    outputs = compiled_outputs(carrying, *one_sample(shared_session("residual")).values())
    np.testing.assert_array_equal(outputs, simulated("residual", "mixed")[0])


def test_attaching_leaves_the_module_alone() -> None:
    """The caller's module carries nothing afterwards."""
    mod = partitioned("residual")
    carrying = hq.attach_plan(mod, named_plan("residual", "a8w8"), host_spec())
    assert {"hquant.plan", "hquant.plan_weights", "hquant.target_spec"} <= set(dict(carrying.attrs))
    assert not mod.attrs or "hquant.plan" not in mod.attrs


def test_module_without_a_plan_is_told_what_to_do() -> None:
    """The name of the pipeline alone says nothing about precisions."""
    with pytest.raises(PlanError, match=r"call hq\.attach_plan\(mod, plan, spec\) before tvm\.compile"):
        compiled_outputs(partitioned("residual"))


def test_plan_of_another_model_is_refused() -> None:
    """Inside tvm.compile too."""
    carrying = hq.attach_plan(partitioned("branches"), named_plan("residual", "a8w8"), host_spec())
    with pytest.raises(PlanError, match="for another model"):
        compiled_outputs(carrying)


def test_registered_once() -> None:
    """TVM knows the pipeline by name, and importing the module again does not register it twice."""
    assert relax.pipeline.PIPELINE_MAP[PIPELINE_NAME] is hquant_pipeline
    assert relax.get_pipeline("hquant").info.name == "hquant.pipeline"
