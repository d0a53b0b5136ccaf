"""A layer's precision rides on its function: protects what is written there, and that nothing impossible ever is."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from tests.planned_models import shared_session, stages, through_text, uniform_plan
from tvm_hquant.errors import PlanError, PrecisionError
from tvm_hquant.layers import LayerGraph, read_layers
from tvm_hquant.operator_codec import encode
from tvm_hquant.operators import Add, Conv2D, Window
from tvm_hquant.passes.annotate_precision import annotate_precision
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.target_spec import load_target_spec

SUM = encode(Add((1, 4)))
CONVOLUTION = encode(Conv2D((1, 4, 4, 2), 2, Window((1, 1))))
WEIGHT = np.arange(4, dtype="float32").reshape(2, 2, 1, 1)


def plan_of(graph: LayerGraph, **precisions: str) -> PrecisionPlan:
    """A plan that gives every layer a precision by name."""
    decisions = {layer: LayerDecision(p, "within budget", "a test") for layer, p in precisions.items()}
    return PrecisionPlan(graph.fingerprint, "some-target", decisions, {})


def convolution_module() -> tvm.IRModule:
    """One partitioned convolution called ``stem``."""

    @I.ir_module
    class Module:
        @R.function(private=True)
        def stem(input_0: R.Tensor((1, 4, 4, 2), "float32")) -> R.Tensor((1, 4, 4, 2), "float32"):
            R.func_attr({"hquant.layer": "stem", "hquant.operator": CONVOLUTION})
            with R.dataflow():
                gv = R.nn.conv2d(input_0, R.const(WEIGHT), data_layout="NHWC", kernel_layout="OIHW")
                R.output(gv)
            return gv

        @R.function
        def main(x: R.Tensor((1, 4, 4, 2), "float32")) -> R.Tensor((1, 4, 4, 2), "float32"):
            R.func_attr({"hquant.inputs": ["x"], "hquant.outputs": ["y"]})
            cls = Module
            with R.dataflow():
                gv: R.Tensor((1, 4, 4, 2), "float32") = cls.stem(x)
                R.output(gv)
            return gv

    return Module


def test_precision_and_reason_become_attributes_and_nothing_else_changes() -> None:
    """The pass adds two attributes to every layer and touches no body; the text of the module says it all."""

    @I.ir_module
    class Before:
        @R.function(private=True)
        def double(input_0: R.Tensor((1, 4), "float32"), input_1: R.Tensor((1, 4), "float32")) -> R.Tensor(
            (1, 4), "float32"
        ):
            R.func_attr({"hquant.layer": "double", "hquant.operator": SUM})
            with R.dataflow():
                gv = R.add(input_0, input_1)
                R.output(gv)
            return gv

        @R.function
        def main(x: R.Tensor((1, 4), "float32")) -> R.Tensor((1, 4), "float32"):
            R.func_attr({"hquant.inputs": ["x"], "hquant.outputs": ["y"]})
            cls = Before
            with R.dataflow():
                gv: R.Tensor((1, 4), "float32") = cls.double(x, x)
                R.output(gv)
            return gv

    @I.ir_module
    class Expected:
        @R.function(private=True)
        def double(input_0: R.Tensor((1, 4), "float32"), input_1: R.Tensor((1, 4), "float32")) -> R.Tensor(
            (1, 4), "float32"
        ):
            R.func_attr(
                {
                    "hquant.layer": "double",
                    "hquant.operator": SUM,
                    "hquant.precision": "a8w8",
                    "hquant.reason": "within budget",
                }
            )
            with R.dataflow():
                gv = R.add(input_0, input_1)
                R.output(gv)
            return gv

        @R.function
        def main(x: R.Tensor((1, 4), "float32")) -> R.Tensor((1, 4), "float32"):
            R.func_attr({"hquant.inputs": ["x"], "hquant.outputs": ["y"]})
            cls = Expected
            with R.dataflow():
                gv: R.Tensor((1, 4), "float32") = cls.double(x, x)
                R.output(gv)
            return gv

    plan = plan_of(read_layers(Before), double="uint8")
    after = annotate_precision(plan)(Before)
    tvm.ir.assert_structural_equal(after, Expected)
    tvm.ir.assert_structural_equal(through_text(after), Expected)
    assert "hquant.precision" not in Before["double"].attrs, "the caller's module was edited"


def test_every_layer_is_annotated() -> None:
    """Also layers without weights have a precision and a reason."""
    session = shared_session("branches")
    plan = uniform_plan(session, "a8w8")
    annotated = stages("branches", "a8w8")["annotate_precision"]
    for layer in session.graph.layers:
        attributes = annotated[layer.function_name].attrs
        assert attributes["hquant.precision"] == plan.layers[layer.name].precision
        assert attributes["hquant.reason"] == plan.layers[layer.name].reason != ""


def test_plan_of_another_model_is_refused() -> None:
    """A plan is bound to weights and shapes: layers of the same names are not enough."""
    plan = plan_of(read_layers(convolution_module()), stem="float32")
    with pytest.raises(PlanError, match="stem"):
        annotate_precision(plan)(shared_session("residual").mod)
    other = PrecisionPlan("0" * 64, plan.target, plan.layers, {})
    with pytest.raises(PlanError, match="shapes or weights differ"):
        annotate_precision(other)(convolution_module())


def test_precision_that_the_target_forbids_is_refused_with_its_reason() -> None:
    """An edited plan cannot go around the target spec; the message has the spec's own words."""
    module = convolution_module()
    plan = plan_of(read_layers(module), stem="float16")
    spec = load_target_spec("generic-int8-npu")
    with pytest.raises(PrecisionError, match=r"layer stem cannot be float16 on some-target: .*integers only"):
        annotate_precision(plan, spec)(module)
    assert "hquant.precision" in annotate_precision(plan)(module)["stem"].attrs
