"""Units that split channels, and shuffle what they join: protects that nothing of it is a copy, and that all bits stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tvm
from tvm import IRModule
from tvm.script import ir as I
from tvm.script import relax as R

from tests.planned_models import built_outputs, new_session, one_sample, plan_stages, uniform_plan
from tests.small_models import assert_calls, with_weights
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.kernel_graph import IN_PLACE, KernelCall
from tvm_hquant.kernels.interface import Interleaving, KernelRequest, Placement
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.operators import Concat, Conv2D, Convert, Epilogue, MaxPool2D, Movement, Unary, Window
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.relax_ir.kernel_calls import KERNEL_ATTRIBUTE
from tvm_hquant.session import QuantizationSession
from tvm_hquant.stored_outputs import StoredOutputs, find_stored_outputs
from tvm_hquant.verification import verify_artifact

SHUFFLE_OF_38 = [half * 19 + channel for channel in range(19) for half in range(2)]


@I.ir_module
class _Units:
    """A unit of ShuffleNet v2 at stride 2, whose parts are both convolutions, and one at stride 1, which splits channels."""

    @R.function
    def main(
        x: R.Tensor((1, 8, 8, 7), "float32"),
        left_weight: R.Tensor((19, 7, 1, 1), "float32"),
        right_weight: R.Tensor((19, 7, 1, 1), "float32"),
        narrow_weight: R.Tensor((19, 19, 1, 1), "float32"),
        depthwise_weight: R.Tensor((19, 1, 3, 3), "float32"),
        wide_weight: R.Tensor((19, 19, 1, 1), "float32"),
        last_weight: R.Tensor((5, 38, 1, 1), "float32"),
    ) -> R.Tensor((1, 4, 4, 5), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            left = R.nn.conv2d(x, left_weight, strides=[2, 2], data_layout="NHWC", kernel_layout="OIHW")
            right = R.nn.conv2d(x, right_weight, strides=[2, 2], data_layout="NHWC", kernel_layout="OIHW")
            first = R.concat((R.nn.relu(left), R.nn.relu(right)), axis=3)
            shuffled = R.take(first, R.const(SHUFFLE_OF_38, "int64"), axis=3)
            kept = R.strided_slice(shuffled, axes=[3], begin=[0], end=[19])
            taken = R.strided_slice(shuffled, axes=[3], begin=[19], end=[38])
            narrow = R.nn.relu(R.nn.conv2d(taken, narrow_weight, data_layout="NHWC", kernel_layout="OIHW"))
            depthwise = R.nn.conv2d(
                narrow, depthwise_weight, padding=[1, 1, 1, 1], groups=19, data_layout="NHWC", kernel_layout="OIHW"
            )
            wide = R.nn.relu(R.nn.conv2d(depthwise, wide_weight, data_layout="NHWC", kernel_layout="OIHW"))
            second = R.concat((kept, wide), axis=3)
            again = R.take(second, R.const(SHUFFLE_OF_38, "int64"), axis=3)
            last = R.nn.conv2d(again, last_weight, data_layout="NHWC", kernel_layout="OIHW")
            R.output(last)
        return last


@I.ir_module
class _Halves:
    """One half gates the other; both are joined again with what a convolution makes of one."""

    @R.function
    def main(
        x: R.Tensor((1, 5, 5, 6), "float32"),
        make_weight: R.Tensor((130, 6, 1, 1), "float32"),
        more_weight: R.Tensor((9, 65, 3, 3), "float32"),
        last_weight: R.Tensor((3, 204, 1, 1), "float32"),
    ) -> R.Tensor((1, 5, 5, 3), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            made = R.nn.conv2d(x, make_weight, data_layout="NHWC", kernel_layout="OIHW")
            low = R.strided_slice(made, axes=[3], begin=[0], end=[65])
            high = R.strided_slice(made, axes=[3], begin=[65], end=[130])
            gated = R.multiply(low, R.sigmoid(high))
            more = R.nn.conv2d(high, more_weight, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
            joined = R.concat((high, more, gated, low), axis=3)
            last = R.nn.conv2d(joined, last_weight, data_layout="NHWC", kernel_layout="OIHW")
            R.output(last)
        return last


_EXPECTED = """
@I.ir_module
class Expected:
    @R.function
    def main(x: R.Tensor((1, 8, 8, 7), "float32")) -> R.Tensor((1, 4, 4, 5), "float32"):
        cls = Expected
        with R.dataflow():
            codes: R.Tensor((1, 8, 8, 7), "uint8") = cls.CONVERSION(x)
            left: R.Tensor((1, 4, 4, 19), "uint8") = cls.left(codes)
            right: R.Tensor((1, 4, 4, 38), "uint8") = cls.right(codes, left)
            first: R.Tensor((1, 4, 4, 38), "uint8") = cls.concat_0(right)
            shuffled: R.Tensor((1, 4, 4, 38), "uint8") = cls.take_0(first)
            kept: R.Tensor((1, 4, 4, 38), "uint8") = cls.strided_slice_0(shuffled)
            taken: R.Tensor((1, 4, 4, 38), "uint8") = cls.strided_slice_1(shuffled)
            narrow: R.Tensor((1, 4, 4, 19), "uint8") = cls.narrow(shuffled)
            depthwise: R.Tensor((1, 4, 4, 19), "uint8") = cls.depthwise(narrow)
            wide: R.Tensor((1, 4, 4, 38), "uint8") = cls.wide(depthwise, shuffled)
            second: R.Tensor((1, 4, 4, 38), "uint8") = cls.concat_1(wide)
            again: R.Tensor((1, 4, 4, 38), "uint8") = cls.take_1(second)
            last: R.Tensor((1, 4, 4, 5), "float32") = cls.last(again)
            gv: R.Tensor((1, 4, 4, 5), "float32") = last
            R.output(gv)
        return gv
"""


@cache
def _session() -> QuantizationSession:
    return new_session(partition_layers()(with_weights(_Units, ["y"])))


@cache
def _stages(precision: str) -> Mapping[str, IRModule]:
    return plan_stages(_session(), uniform_plan(_session(), precision))


def test_calls_after_the_pass() -> None:
    """The later convolution of a concatenation gets what the other one made, and makes both; slices are what they lie in."""
    stages = _stages("a8w8")
    after = stages["lower_layers"]
    conversion = after["main"].body.blocks[0].bindings[0].value.op.name_hint
    assert_calls(after, _EXPECTED.replace("CONVERSION", conversion))
    tvm.ir.assert_structural_equal(after["main"], stages["write_concat_in_place"]["main"], map_free_vars=True)
    in_place = ("concat_0", "take_0", "strided_slice_0", "strided_slice_1", "concat_1", "take_1")
    assert {str(after[name].attrs[KERNEL_ATTRIBUTE]) for name in in_place} == {IN_PLACE}


@pytest.mark.parametrize("precision", ["a8w8", "float32", "a16w8"])
def test_the_module_keeps_its_outputs(precision: str) -> None:
    """Before and after the pass, and in the simulator, the same bits; the artifact's check compares every tensor."""
    session, modules = _session(), _stages(precision)
    inputs = one_sample(session)
    before, after = (built_outputs(modules[s], *inputs.values()) for s in ("realize_quantization", "lower_layers"))
    np.testing.assert_array_equal(before[0], after[0])
    plan = uniform_plan(session, precision)
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    np.testing.assert_array_equal(after[0], session.engine.run(inputs, [program])[0][0])
    if precision == "a16w8":
        return
    report = verify_artifact(compile_artifact(session.mod, plan, session.spec), [inputs])
    assert report.holds
    kernels = {check.layer: check.kernel for check in report.checks}
    assert {kernels[name] for name in ("take_0", "concat_1", "strided_slice_1")} == {IN_PLACE}


@pytest.mark.parametrize("precision", ["a8w8", "float32"])
def test_gates_and_concatenations_read_slices(precision: str) -> None:
    """Layers without weights read halves where they are, and so do copies into the buffer of a concatenation."""
    session = new_session(partition_layers()(with_weights(_Halves, ["y"])))
    report = verify_artifact(compile_artifact(session.mod, uniform_plan(session, precision), session.spec))
    assert report.holds
    kernels = {check.layer: check.kernel for check in report.checks}
    assert kernels["strided_slice_0"] == IN_PLACE
    if precision == "float32":
        assert {kernels["strided_slice_1"], kernels["concat_0"]} == {IN_PLACE}


def test_the_check_finds_kernels_that_store_something_else() -> None:
    """Constants of another plan make a layer differ that stores in turns: the report names it, and no other."""
    session = _session()
    artifact = compile_artifact(session.mod, uniform_plan(session, "float32"), session.spec)
    with np.load(artifact.folder / "weights.npz") as archive:
        weights = dict(archive)
    changed = next(name for name in weights if "wide" in name and weights[name].ndim == 4)
    weights[changed] = weights[changed] * np.float32(1.5)
    np.savez(artifact.folder / "weights.npz", **weights)
    report = verify_artifact(artifact, [one_sample(session)])
    different = {check.layer: check.note for check in report.checks if check.different}
    assert different == {"wide": "the constants in the library are not those of the plan"}


def _conv(tensor: str, *inputs: str, channels: int = 8, operator: Conv2D | None = None) -> KernelCall:
    plain = Conv2D((1, 4, 4, 8), channels, Window((1, 1)))
    return KernelCall(tensor, KernelRequest(operator or plain, ("uint8",) * len(inputs), "uint8", "int8"), inputs)


def _concat(tensor: str, *inputs: str, channels: int = 8) -> KernelCall:
    operator = Concat(((1, 4, 4, channels),) * len(inputs), 3)
    return KernelCall(tensor, KernelRequest(operator, ("uint8",) * len(inputs), "uint8"), inputs)


def _take(tensor: str, source: str, groups: int = 2, channels: int = 16) -> KernelCall:
    indices = [group * (channels // groups) + i for i in range(channels // groups) for group in range(groups)]
    operator = Movement("take", (1, 4, 4, channels), (1, 4, 4, channels), (3, *indices))
    return KernelCall(tensor, KernelRequest(operator, ("uint8",), "uint8"), (source,))


def _slice(tensor: str, source: str, first: int, step: int = 1) -> KernelCall:
    operator = Movement("strided_slice", (1, 4, 4, 16), (1, 4, 4, 8), (3, first, step))
    return KernelCall(tensor, KernelRequest(operator, ("uint8",), "uint8"), (source,))


def _found(
    *calls: KernelCall, outputs: tuple[str, ...] = ("y",), families: tuple[str, ...] = ("portable",)
) -> StoredOutputs:
    return find_stored_outputs(calls, outputs, families_for_target(families))


def test_what_is_stored_in_turns() -> None:
    """Two tensors of as many channels, shuffled into two groups, of which a convolution makes the later one."""
    a, b, concat, take = _conv("a", "x"), _conv("b", "x"), _concat("c", "a", "b"), _take("y", "c")
    found = _found(a, b, concat, take)
    assert found.kernels["b"].request.interleaved == Interleaving(1)
    assert found.names == {"c": "b", "y": "b"}
    assert found.read("b", ("x",)) == ("x", "a")
    assert _found(a, b, _concat("c", "b", "a"), take).kernels["b"].request.interleaved == Interleaving(0)
    # Of the graph's input.
    assert _found(b, _concat("c", "x", "b"), take).read("b", ("x",)) == ("x", "x")
    # Other orders, other readers, tensors that leave the graph, other numbers of channels, no convolution.
    assert not _found(a, b, concat, _take("y", "c", 4)).interleaved
    assert not _found(a, b, concat, take, _conv("z", "b")).interleaved
    assert not _found(a, b, concat, take, _conv("z", "c")).interleaved
    assert not _found(a, b, concat, take, outputs=("y", "b")).interleaved
    assert not _found(a, b, concat, take, outputs=("y", "c")).interleaved
    unequal = KernelRequest(Concat(((1, 4, 4, 4), (1, 4, 4, 12)), 3), ("uint8", "uint8"), "uint8")
    assert not _found(
        _conv("a", "x", channels=4), _conv("b", "x", channels=12), replace(concat, request=unequal), take
    ).interleaved
    relu = KernelCall("b", KernelRequest(Unary((1, 4, 4, 8), "sigmoid"), ("uint8",), "uint8"), ("x",))
    assert not _found(a, relu, concat, take).interleaved
    summed = _conv("b", "x", "a", operator=Conv2D((1, 4, 4, 8), 8, Window((1, 1)), 1, Epilogue(True, True)))
    assert _found(a, summed, concat, take).read("b", ("x", "a")) == ("x", "a", "a")
    assert not _found(a, b, concat, take, families=("cuda",)).interleaved


def test_which_slices_are_read_in_place() -> None:
    """Neighbouring channels that convolutions read, or that are stored in turns; one other reader, and it is a copy for all."""
    low, high = _slice("low", "x", 0), _slice("high", "x", 8)
    b, concat, take = _conv("b", "high"), _concat("c", "low", "b"), _take("y", "c")
    found = _found(low, high, b, concat, take)
    assert {name: s.placement for name, s in found.slices.items()} == {
        "low": Placement(0, 16),
        "high": Placement(8, 16),
    }
    request = found.kernels["b"].request
    assert (request.sources, request.interleaved) == ((Placement(8, 16),), Interleaving(1, Placement(0, 16)))
    assert found.read("b", ("high",)) == ("x", "x")
    assert found.read("low", ("x",)) == ("x",)
    plain = _found(high, _conv("y", "high"))
    assert plain.kernels["y"].request.sources == (Placement(8, 16),)
    few = KernelRequest(MaxPool2D((1, 4, 4, 8), Window((2, 2))), ("uint8",), "uint8")
    assert not _found(high, _conv("y", "high"), KernelCall("z", few, ("high",))).slices
    # What is computed element by element, unless vectors would stay empty; concatenations, whose other parts stay in place.
    convert = KernelCall("y", KernelRequest(Convert((1, 4, 4, 8)), ("uint8",), "float32"), ("high",))
    assert _found(high, convert).kernels["y"].request.sources == (Placement(8, 16),)
    assert not _found(high, convert, families=("avx512_vnni",)).slices
    table = KernelCall("y", KernelRequest(Unary((1, 4, 4, 8), "sigmoid"), ("uint8",), "uint8"), ("high",))
    assert not _found(high, table).slices
    joined = _found(low, high, _conv("b", "high"), _concat("y", "high", "b", "low"))
    assert [(p.tensor, p.is_copy, p.kernel.request.sources) for p in joined.concats["y"]] == [
        ("x", True, (Placement(8, 16),)),
        ("b", False, (Placement(8, 16),)),
        ("x", True, (Placement(0, 16),)),
    ]
    assert not _found(high, _conv("y", "high"), outputs=("y", "high")).slices
    assert not _found(_slice("high", "x", 0, 2), _conv("y", "high")).slices
    assert not _found(high, _conv("y", "high"), families=("cuda",)).slices


def test_slices_keep_their_memory() -> None:
    """What a slice lies in is written over when nothing reads the slice any more, not when the slice itself is passed."""
    make, high, conv = _conv("m", "x", channels=16), _slice("high", "m", 8), _conv("y", "high")
    wide = Conv2D((1, 4, 4, 8), 16, Window((1, 1)), 1, Epilogue(True, True))
    summed = KernelCall("z", KernelRequest(wide, ("uint8", "uint8"), "uint8", "int8"), ("y", "m"))
    assert _found(make, high, conv, summed, outputs=("z",)).kernels["z"].request.overwritten == 1
    second = _conv("w", "high")
    for calls in ((conv, summed, second), (conv, second, summed)):
        found = _found(make, high, *calls, outputs=("z", "w"))
        assert "high" in found.slices
        assert "z" not in found.kernels
    # Channels in a wider buffer are no buffer to write into.
    same = KernelCall(
        "z", KernelRequest(replace(wide, out_channels=8), ("uint8", "uint8"), "uint8", "int8"), ("y", "high")
    )
    request = _found(make, high, conv, same, outputs=("z",)).kernels["z"].request
    assert (request.sources, request.overwritten) == ((None, Placement(8, 16)), None)


def test_what_is_stored_in_turns_is_one_buffer() -> None:
    """A layer behind the shuffle writes over it, unless somebody else reads it."""
    a, b, concat, take = _conv("a", "x"), _conv("b", "x"), _concat("c", "a", "b"), _take("t", "c")
    over = KernelCall("y", KernelRequest(Unary((1, 4, 4, 16), "sigmoid"), ("uint8",), "uint8"), ("t",))
    assert _found(a, b, concat, take, over).kernels["y"].request.overwritten == 0
    high = _slice("high", "t", 8)
    shared = _found(a, b, concat, take, over, high, _conv("z", "high"), outputs=("y", "z"))
    assert "high" in shared.slices
    assert "y" not in shared.kernels
