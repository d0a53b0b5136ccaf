"""Concatenations without copies: protects that every input ends up at its place, and that nothing else is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import IRModule
from tvm.script import ir as I
from tvm.script import relax as R

from tests.kernels import anchor_cases as anchors
from tests.kernels.kernel_cases import Case, pools
from tests.planned_models import built_outputs, new_session, one_sample, plan_stages, uniform_plan
from tests.small_models import assert_calls, with_weights
from tvm_hquant import numerics
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.interface import KernelRequest, LayerConstants, NoConstants, Placement
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import Concat, Conv2D, Movement, Window
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.session import QuantizationSession
from tvm_hquant.verification import verify_artifact


@I.ir_module
class _Joined:
    """Of the four joined tensors ``stem`` has other readers, so it exists by itself; ``late`` has it as its residual."""

    @R.function
    def main(
        x: R.Tensor((1, 6, 6, 8), "float32"),
        stem_weight: R.Tensor((8, 8, 1, 1), "float32"),
        left_weight: R.Tensor((24, 8, 3, 3), "float32"),
        late_weight: R.Tensor((8, 8, 1, 1), "float32"),
        merge_weight: R.Tensor((5, 48, 1, 1), "float32"),
    ) -> R.Tensor((1, 6, 6, 5), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            stem = R.nn.conv2d(x, stem_weight, data_layout="NHWC", kernel_layout="OIHW")
            left = R.nn.conv2d(stem, left_weight, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
            pool = R.nn.max_pool2d(stem, (3, 3), (1, 1), padding=[1, 1, 1, 1], layout="NHWC")
            late = R.nn.conv2d(stem, late_weight, data_layout="NHWC", kernel_layout="OIHW")
            summed = R.add(late, stem)
            joined = R.concat((pool, left, stem, summed), axis=3)
            merge = R.nn.conv2d(joined, merge_weight, data_layout="NHWC", kernel_layout="OIHW")
            R.output(merge)
        return merge


_EXPECTED = """
@I.ir_module
class Expected:
    @R.function
    def main(x: R.Tensor((1, 6, 6, 8), "float32")) -> R.Tensor((1, 6, 6, 5), "float32"):
        cls = Expected
        with R.dataflow():
            codes: R.Tensor((1, 6, 6, 8), "uint8") = cls.CONVERSION(x)
            stem: R.Tensor((1, 6, 6, 8), "uint8") = cls.stem(codes)
            left: R.Tensor((1, 6, 6, 48), "uint8") = cls.left(stem)
            pool: R.Tensor((1, 6, 6, 48), "uint8") = cls.max_pool2d_0(stem, left)
            late: R.Tensor((1, 6, 6, 48), "uint8") = cls.late(stem, stem, pool)
            part2: R.Tensor((1, 6, 6, 48), "uint8") = cls.concat_0_part2(stem, late)
            joined: R.Tensor((1, 6, 6, 48), "uint8") = cls.concat_0(part2)
            merge: R.Tensor((1, 6, 6, 5), "float32") = cls.merge(joined)
            gv: R.Tensor((1, 6, 6, 5), "float32") = merge
            R.output(gv)
        return gv
"""


@cache
def _session() -> QuantizationSession:
    return new_session(partition_layers()(with_weights(_Joined, ["y"])))


@cache
def _stages(precision: str) -> Mapping[str, IRModule]:
    return plan_stages(_session(), uniform_plan(_session(), precision))


def test_calls_after_the_pass() -> None:
    """The first kernel makes the buffer, the others get it; what exists by itself is copied; the concat is a name."""
    after = _stages("a8w8")["write_concat_in_place"]
    conversion = after["main"].body.blocks[0].bindings[0].value.op.name_hint
    assert_calls(after, _EXPECTED.replace("CONVERSION", conversion))
    kernels = {
        name: after[name].body.blocks[0].bindings[0].value
        for name in ("left", "max_pool2d_0", "late", "concat_0_part2")
    }
    assert {name: str(call.op.name) for name, call in kernels.items()} == {
        "left": "relax.call_tir",
        "max_pool2d_0": "relax.call_tir_inplace",
        "late": "relax.call_tir_inplace",
        "concat_0_part2": "relax.call_tir_inplace",
    }


@pytest.mark.parametrize("precision", ["a8w8", "float32", "a16w8"])
def test_the_module_keeps_its_outputs(precision: str) -> None:
    """Before and after the pass, and in the simulator, the same bits; the artifact's check knows the kernels that it has."""
    session, modules = _session(), _stages(precision)
    inputs = one_sample(session)
    before, after = (built_outputs(modules[s], *inputs.values()) for s in ("lower_layers", "write_concat_in_place"))
    np.testing.assert_array_equal(before[0], after[0])
    plan = uniform_plan(session, precision)
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    np.testing.assert_array_equal(after[0], session.engine.run(inputs, [program])[0][0])
    if precision == "a8w8":
        report = verify_artifact(compile_artifact(session.mod, plan, session.spec), [inputs])
        assert report.holds
        assert {c.layer: c.kernel for c in report.checks}["concat_0"] == "in place"


@I.ir_module
class _Nested:
    """A concatenation whose inputs are written in place is an input of another one."""

    @R.function
    def main(
        x: R.Tensor((1, 6, 6, 8), "float32"),
        left_weight: R.Tensor((24, 8, 1, 1), "float32"),
        right_weight: R.Tensor((8, 8, 1, 1), "float32"),
        outer_weight: R.Tensor((16, 8, 1, 1), "float32"),
    ) -> R.Tensor((1, 6, 6, 48), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            left = R.nn.conv2d(x, left_weight, data_layout="NHWC", kernel_layout="OIHW")
            right = R.nn.conv2d(x, right_weight, data_layout="NHWC", kernel_layout="OIHW")
            inner = R.concat((left, right), axis=3)
            outer = R.nn.conv2d(x, outer_weight, data_layout="NHWC", kernel_layout="OIHW")
            joined = R.concat((inner, outer), axis=3)
            R.output(joined)
        return joined


def test_a_concatenation_in_place_is_copied_into_another() -> None:
    """Its buffer is its own: no kernel of it could write elsewhere."""
    session = new_session(partition_layers()(with_weights(_Nested, ["y"])))
    modules = plan_stages(session, uniform_plan(session, "float32"))
    inputs = one_sample(session)
    before, after = (built_outputs(modules[s], *inputs.values()) for s in ("lower_layers", "write_concat_in_place"))
    np.testing.assert_array_equal(before[0], after[0])
    copied = modules["write_concat_in_place"]["concat_1_part0"].body.blocks[0].bindings[0].value
    assert str(copied.op.name) == "relax.call_tir_inplace"


@st.composite
def _placed_cases(draw: st.DrawFn) -> tuple[str, KernelRequest, LayerConstants, list[np.ndarray]]:
    family = draw(st.sampled_from([f for f in ("avx512_vnni", "avx2", "portable") if f in anchors.HOST]))
    kind = draw(st.sampled_from(["conv", "depthwise", "grouped", "pool", "concat", "pixels"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    channels = draw(st.sampled_from([6, 24, 48]))
    shape = (1, draw(st.integers(2, 6)), draw(st.integers(2, 6)), channels)
    storage = draw(st.sampled_from(["uint8", "float32"]))
    if kind == "pool":
        case: Case = draw(pools().filter(lambda c: c.request.output in ("uint8", "float32")))
        return family, case.request, case.constants, case.inputs()
    if kind == "concat":
        request = KernelRequest(Concat((shape,), 3), (storage,), storage)
        return family, request, NoConstants(), [anchors.random_activations(rng, shape, storage)]
    if kind == "pixels":
        height, width = draw(st.integers(1, 2 * shape[1])), draw(st.integers(1, 3 * shape[2]))
        pixels = Movement("depth_to_space", shape, (1, height, width, channels // 6), (1, 2, 3, 0, 0))
        request = KernelRequest(pixels, (storage,), storage)
        return family, request, NoConstants(), [anchors.random_activations(rng, shape, storage)]
    groups = {"conv": 1, "depthwise": channels, "grouped": 2}[kind]
    conv = Conv2D(shape, channels, Window((2, 2), padding=(1, 0, 0, 1)), groups)
    weights = "int8" if storage == "uint8" else "float32"
    return family, *anchors.random_case(rng, KernelRequest(conv, (storage,), storage, weights))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=_placed_cases(), offset=st.integers(0, 9), behind=st.integers(0, 9))
def test_kernels_write_their_part_only(case: tuple, offset: int, behind: int) -> None:
    """Every kind of kernel that can be placed: its channels are exact, all others stay as they were."""
    family, request, constants, inputs = case
    own = request.operator.output_shape[-1]
    placed = replace(request, placement=Placement(offset, offset + own + behind))
    kernel = select_kernel(families_for_target((family,)), placed)
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, target=tvm.target.Target(anchors.TARGETS[family]), tir_pipeline=CPU_PIPELINE)
    expected = numerics.evaluate(request, constants, inputs)
    buffer = tvm.runtime.tensor(np.full(placed.output_shape, 77, expected.dtype))
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*inputs, *kernel.pack(constants))]
    library["kernel"](*arguments, buffer)
    whole = np.full(placed.output_shape, 77, expected.dtype)
    whole[..., offset : offset + own] = expected
    np.testing.assert_array_equal(buffer.numpy(), whole)
