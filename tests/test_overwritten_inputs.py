"""Outputs over inputs: protects that nothing is overwritten that is still read, and that kernels read before they write."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from tests.kernels import anchor_cases as anchors
from tests.kernels.kernel_cases import additions, assert_same_bits, code_unaries, conversions
from tests.planned_models import built_outputs, new_session, one_sample, plan_stages, uniform_plan
from tests.small_models import with_weights
from tvm_hquant import numerics
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import Kernel, KernelRequest
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES, families_for_target
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.layers import is_constant
from tvm_hquant.operators import Add, Conv2D, Epilogue, Movement, Unary, Window
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.stored_outputs import find_stored_outputs
from tvm_hquant.tensor_format import STORAGE_DTYPE
from tvm_hquant.verification import verify_artifact

SHAPE = (1, 4, 4, 16)


@I.ir_module
class _Blocks:
    """Two residual blocks; the sum of the first is read again behind the second."""

    @R.function
    def main(
        x: R.Tensor((1, 6, 6, 16), "float32"),
        stem_weight: R.Tensor((64, 16, 1, 1), "float32"),
        body_weight: R.Tensor((64, 64, 1, 1), "float32"),
        first_weight: R.Tensor((64, 64, 1, 1), "float32"),
        second_weight: R.Tensor((64, 64, 1, 1), "float32"),
        third_weight: R.Tensor((64, 64, 1, 1), "float32"),
    ) -> R.Tensor((1, 6, 6, 64), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            stem = R.nn.conv2d(x, stem_weight, data_layout="NHWC", kernel_layout="OIHW")
            body = R.nn.conv2d(stem, body_weight, data_layout="NHWC", kernel_layout="OIHW")
            first = R.nn.conv2d(body, first_weight, data_layout="NHWC", kernel_layout="OIHW")
            first_sum = R.nn.relu(R.add(first, stem))
            second = R.nn.conv2d(first_sum, second_weight, data_layout="NHWC", kernel_layout="OIHW")
            second_sum = R.nn.relu(R.add(second, first_sum))
            third = R.nn.conv2d(second_sum, third_weight, data_layout="NHWC", kernel_layout="OIHW")
            third_sum = R.add(third, first_sum)
            R.output(third_sum)
        return third_sum


@pytest.mark.parametrize("precision", ["a8w8", "float32"])
def test_lowered_layers_write_over_residuals(precision: str) -> None:
    """The residual is the last argument of the first block's kernel, which writes into it; the second must leave it alone.

    The layers and ``main`` stay as they are; the outputs, too; the artifact's check finds the kernels that it has.
    """
    session = new_session(partition_layers()(with_weights(_Blocks, ["y"])))
    plan = uniform_plan(session, precision)
    modules = plan_stages(session, plan)
    before, after = modules["realize_quantization"], modules["lower_layers"]
    tvm.ir.assert_structural_equal(before["main"], after["main"], map_free_vars=True)
    calls = {name: after[name].body.blocks[0].bindings[0].value for name in ("first", "second", "third")}
    written_over = "relax.call_tir_inplace"
    names = {name: str(call.op.name) for name, call in calls.items()}
    # The last sum leaves the graph in float32: in a8w8 no input is stored like that.
    last = written_over if precision == "float32" else "relax.call_tir"
    assert names == {"first": written_over, "second": "relax.call_tir", "third": last}
    source, *constants, residual = calls["first"].args[1].fields
    assert [source, residual] == list(after["first"].params)
    assert all(map(is_constant, constants))
    assert list(calls["first"].attrs.inplace_indices) == [1 + len(constants)]
    inputs = one_sample(session)
    ours, expected = (built_outputs(mod, *inputs.values())[0] for mod in (after, before))
    np.testing.assert_array_equal(ours, expected)
    report = verify_artifact(compile_artifact(session.mod, plan, session.spec), [inputs])
    assert report.holds


def test_what_is_overwritten() -> None:
    """Only what a kernel of the graph made, and nobody reads any more: the others must come before by what they compute."""
    conv = KernelRequest(Conv2D(SHAPE, 16, Window((1, 1))), ("uint8",), "uint8", "int8")
    add = KernelRequest(Add(SHAPE), ("uint8", "uint8"), "uint8")
    view = KernelRequest(Movement("reshape", SHAPE, SHAPE), ("uint8",), "uint8")
    fused = replace(conv, operator=replace(conv.operator, epilogue=Epilogue(False, True)), inputs=("uint8", "uint8"))
    a, b, c = (KernelCall(name, conv, (source,)) for name, source in (("a", "x"), ("b", "a"), ("c", "b")))

    def overwritten(*calls: KernelCall, outputs: tuple[str, ...] = ("y",)) -> int | None:
        """Which input of ``y`` is overwritten."""
        families = families_for_target(("portable",))
        kernel = find_stored_outputs(calls, outputs, families).kernels.get("y")
        return None if kernel is None else kernel.request.overwritten

    assert overwritten(a, b, KernelCall("y", fused, ("b", "a"))) == 1
    assert overwritten(a, b, KernelCall("y", add, ("b", "a"))) == 0
    # Of the caller.
    assert overwritten(a, b, KernelCall("y", add, ("x", "b"))) == 1
    assert overwritten(a, KernelCall("y", fused, ("a", "x"))) is None
    # An output, read by the same layer twice, read by an independent layer, and by one that depends on the sum.
    assert overwritten(a, b, KernelCall("y", fused, ("b", "a")), outputs=("y", "a")) is None
    assert overwritten(a, b, KernelCall("y", fused, ("a", "a"))) is None
    assert overwritten(a, b, KernelCall("y", fused, ("b", "a")), KernelCall("z", conv, ("a",))) is None
    assert overwritten(a, b, KernelCall("z", conv, ("a",)), KernelCall("y", fused, ("b", "a"))) is None
    assert overwritten(a, b, KernelCall("y", fused, ("b", "a")), KernelCall("z", add, ("y", "a"))) is None
    # Through views: of the residual itself, and a view that somebody else reads.
    seen = KernelCall("seen", view, ("a",))
    assert overwritten(a, seen, b, KernelCall("y", fused, ("b", "seen"))) == 1
    assert overwritten(a, seen, b, KernelCall("y", fused, ("b", "a")), KernelCall("z", conv, ("seen",))) is None
    assert overwritten(a, seen, KernelCall("y", add, ("seen", "a"))) is None
    # What TVM's operators read or make.
    opaque = KernelCall("o", None, ("a",))
    assert overwritten(a, opaque, KernelCall("p", conv, ("o",)), KernelCall("y", fused, ("p", "a"))) is None
    assert overwritten(a, opaque, KernelCall("p", conv, ("o",)), KernelCall("y", fused, ("p", "o"))) is None
    # Another storage; a kernel whose last vector overlaps; what a concatenation reads is placed elsewhere.
    other = replace(fused, inputs=("uint8", "uint16"))
    assert (
        overwritten(a, replace(b, request=replace(conv, output="uint16")), KernelCall("y", other, ("a", "b"))) is None
    )
    odd = KernelRequest(Add((3, 3)), ("uint8", "uint8"), "uint8")
    small = [replace(call, request=KernelRequest(Unary((3, 3), "clip"), ("uint8",), "uint8")) for call in (a, b, c)]
    assert overwritten(*small, KernelCall("y", odd, ("b", "c"))) is None


def run_over_input(kernel: Kernel, constants, inputs: list[np.ndarray], target: dict) -> np.ndarray:
    """Compiles a kernel and calls it on a buffer that holds one of its inputs."""
    number = kernel.request.overwritten
    assert number is not None
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, target=tvm.target.Target(target), tir_pipeline=CPU_PIPELINE)
    others = [array for index, array in enumerate(inputs) if index != number]
    buffer = tvm.runtime.tensor(np.ascontiguousarray(inputs[number]))
    library["kernel"](
        *(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*others, *kernel.pack(constants))), buffer
    )
    return buffer.numpy()


@pytest.mark.parametrize("family", anchors.FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    size=st.tuples(st.integers(1, 2), st.integers(3, 9), st.integers(3, 11)),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 20),
    outputs=st.sampled_from([3, 8, 16, 24, 32, 48, 64, 96]),
    window=st.sampled_from([Window((1, 1)), Window((3, 3), padding=(1, 1, 1, 1)), Window((1, 1), (2, 2))]),
    storage=st.sampled_from(["uint8", "uint16", "float32", "bfloat16"]),
    seed=st.integers(0, 2**31),
)
def test_convolutions_over_residuals_are_exact(family, size, groups, inputs, outputs, window, storage, seed) -> None:
    """Tiles of any shape, groups narrower than a vector, several passes: no residual is read where a sum has been written.

    Depthwise layers and those whose tiles overlap along the channels have no such kernel.
    """
    operator = Conv2D((*size, inputs * groups), outputs * groups, window, groups, Epilogue(True, True))
    weights = "int8" if storage in ("uint8", "uint16") else storage
    plain = KernelRequest(operator, (storage, storage), storage, weights)
    request, constants, values = anchors.random_case(np.random.default_rng(seed), plain)
    kernel = ANCHOR_FAMILIES[family].kernel(replace(request, overwritten=1))
    assume(kernel is not None)
    assert kernel is not None
    stored = run_over_input(kernel, constants, values, anchors.TARGETS[family])
    np.testing.assert_array_equal(stored, numerics.evaluate(request, constants, values), kernel.name)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=st.one_of(additions(), conversions(), code_unaries()), number=st.integers(0, 1))
def test_elementwise_kernels_over_inputs_are_exact(case, number) -> None:
    """Sums, functions, tables and conversions of any storage that keeps its size, over either input."""
    assume(number < len(case.request.inputs))
    assume(STORAGE_DTYPE[case.request.inputs[number]] == STORAGE_DTYPE[case.request.output])
    kernel = CommonFamily(8).kernel(replace(case.request, overwritten=number))
    # Not where the last vector overlaps the one before it.
    assume(kernel is not None)
    assert kernel is not None
    inputs = case.inputs()
    stored = run_over_input(kernel, case.constants, inputs, anchors.TARGETS["portable"])
    assert_same_bits(stored, numerics.evaluate(case.request, case.constants, inputs), case)
