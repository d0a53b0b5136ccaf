"""Channel shuffles that kernels absorb: protects the order of channels, and that only what nobody else reads is shuffled."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from tests.kernels import anchor_cases as anchors
from tests.planned_models import built_outputs, new_session, one_sample, plan_stages, uniform_plan
from tests.small_models import with_weights
from tvm_hquant import numerics
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.channel_shuffles import find_absorbed_shuffles
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import KernelRequest, Placement
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES
from tvm_hquant.operators import Conv2D, Epilogue, Movement, Window
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.relax_ir.kernel_calls import REQUEST_ATTRIBUTE
from tvm_hquant.session import QuantizationSession
from tvm_hquant.stored_outputs import in_channel_order
from tvm_hquant.verification import verify_artifact

SHUFFLE_OF_24 = [group * 6 + channel for channel in range(6) for group in range(4)]


@I.ir_module
class _Shuffled:
    """A unit of ShuffleNet; then a convolution whose unshuffled output is read, too."""

    @R.function
    def main(
        x: R.Tensor((1, 6, 6, 24), "float32"),
        narrow_weight: R.Tensor((24, 6, 1, 1), "float32"),
        depthwise_weight: R.Tensor((24, 1, 3, 3), "float32"),
        wide_weight: R.Tensor((24, 6, 1, 1), "float32"),
    ) -> R.Tuple(R.Tensor((1, 6, 6, 24), "float32"), R.Tensor((1, 6, 6, 24), "float32")):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            narrow = R.nn.conv2d(x, narrow_weight, groups=4, data_layout="NHWC", kernel_layout="OIHW")
            relu = R.nn.relu(narrow)
            shuffled = R.take(relu, R.const(SHUFFLE_OF_24, "int64"), axis=3)
            depthwise = R.nn.conv2d(
                shuffled, depthwise_weight, padding=[1, 1, 1, 1], groups=24, data_layout="NHWC", kernel_layout="OIHW"
            )
            wide = R.nn.conv2d(depthwise, wide_weight, groups=4, data_layout="NHWC", kernel_layout="OIHW")
            last = R.take(wide, R.const(SHUFFLE_OF_24, "int64"), axis=3)
            result = (wide, last)
            R.output(result)
        return result


@I.ir_module
class _InPlace:
    @R.function(private=True)
    def take_0(buffer: R.Tensor((1, 6, 6, 24), "uint8")) -> R.Tensor((1, 6, 6, 24), "uint8"):
        with R.dataflow():
            gv: R.Tensor((1, 6, 6, 24), "uint8") = buffer
            R.output(gv)
        return gv


@cache
def _session() -> QuantizationSession:
    return new_session(partition_layers()(with_weights(_Shuffled, ["wide", "last"])))


@pytest.mark.skipif("avx2" not in anchors.HOST, reason="this CPU has no AVX2")
def test_a_shuffle_becomes_a_name() -> None:
    """The convolution stores its channels shuffled, and the shuffle gives back what it gets; ``main`` and the outputs stay."""
    session = _session()
    plan = uniform_plan(session, "a8w8")
    modules = plan_stages(session, plan, ("avx2",))
    before, after = modules["realize_quantization"], modules["lower_layers"]
    bare = after["take_0"]
    for attribute in dict(bare.attrs):
        bare = bare.without_attr(attribute)
    tvm.ir.assert_structural_equal(bare, _InPlace["take_0"].without_attr("global_symbol"), map_free_vars=True)
    tvm.ir.assert_structural_equal(before["main"], after["main"], map_free_vars=True)
    shuffled = {
        name: '"shuffled":4' in str(after[name].attrs[REQUEST_ATTRIBUTE]).replace(" ", "")
        for name in ("narrow", "wide")
    }
    assert shuffled == {"narrow": True, "wide": False}
    assert after["take_1"].attrs["hquant.kernel"] == "common.take[8]"
    inputs = one_sample(session)
    for ours, expected in zip(*(built_outputs(m, *inputs.values()) for m in (before, after)), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("precision", ["a8w7", "float32"])
def test_an_artifact_with_shuffles_is_verified(precision: str) -> None:
    """Tensors of the library are compared in the order of their channels; the shuffle is named as one that moves nothing."""
    session = _session()
    artifact = compile_artifact(session.mod, uniform_plan(session, precision), session.spec)
    report = verify_artifact(artifact, [one_sample(session)])
    assert report.holds
    kernels = {check.layer: check.kernel for check in report.checks}
    if "avx2" in anchors.HOST:
        assert kernels["take_0"] == "in place"
        assert "shuffled" in kernels["narrow"]


def test_what_is_not_absorbed() -> None:
    """Other orders and readers, outputs of the graph, residuals, many groups."""
    conv = Conv2D((1, 4, 4, 24), 48, Window((1, 1)), 4)
    maker = KernelCall("conv", KernelRequest(conv, ("uint8",), "uint8", "int8"), ("x",))

    def take(indices: list[int]) -> KernelCall:
        operator = Movement("take", conv.output_shape, conv.output_shape, (3, *indices))
        return KernelCall("take", KernelRequest(operator, ("uint8",), "uint8"), ("conv",))

    def shuffle(groups: int) -> list[int]:
        return [group * (48 // groups) + channel for channel in range(48 // groups) for group in range(groups)]

    def found(*calls: KernelCall, outputs: tuple[str, ...] = ("take",), family: str = "avx2") -> bool:
        return bool(find_absorbed_shuffles(calls, outputs, (ANCHOR_FAMILIES[family],)))

    right = take(shuffle(4))
    assert all(found(maker, right, family=family) for family in ("avx2", "portable", "arm_i8mm", "arm_neon"))
    assert found(maker, take(shuffle(3)))
    assert not found(maker, take(shuffle(24)))
    assert not found(maker, take(shuffle(4)[::-1]))
    assert not found(maker, right, outputs=("take", "conv"))
    assert not found(maker, right, replace(right, tensor="other"))
    residual = replace(conv, epilogue=Epilogue(has_residual=True))
    assert not found(replace(maker, request=KernelRequest(residual, ("uint8", "uint8"), "uint8", "int8")), right)


@pytest.mark.parametrize(
    ("conv", "lanes_take_turns"),
    [
        (Conv2D((1, 28, 28, 24), 24, Window((1, 1)), 4, Epilogue(lower=0.0)), True),
        (Conv2D((1, 28, 28, 960), 24, Window((1, 1)), 4, Epilogue(lower=0.0)), False),
        (Conv2D((1, 8, 8, 24), 24, Window((3, 3), padding=(1, 1, 1, 1)), 4, Epilogue(lower=0.0)), True),
        (Conv2D((1, 8, 8, 24), 24, Window((3, 3), padding=(1, 1, 1, 1)), 4), False),
    ],
    ids=["few channels", "many channels", "padding left out", "padding"],
)
def test_where_lanes_take_turns(conv: Conv2D, lanes_take_turns: bool) -> None:
    """Where copying the outputs takes less than copying the inputs, and where these need padding, outputs are shuffled last."""
    request = KernelRequest(conv, ("float32",), "float32", "float32", finite_weights=True, shuffled=4)
    kernel = ANCHOR_FAMILIES["avx2"].kernel(request)
    assert kernel is not None
    assert kernel.name.endswith("shuffled]" if lanes_take_turns else "shuffled last]")


@pytest.mark.parametrize("family", anchors.FAMILIES)
@pytest.mark.parametrize("storage", ["uint8", "float32", "bfloat16"])
@pytest.mark.parametrize(("groups", "shuffled"), [(1, 6), (2, 5), (3, 8), (2, 16)])
def test_other_groups_than_the_convolutions(family: str, storage: str, groups: int, shuffled: int) -> None:
    """Constants in another order behind an ordinary convolution, a copy in the end behind others: the contract's values."""
    operator = Conv2D((1, 3, 5, 12 * groups), 240, Window((1, 1)), groups, Epilogue(True))
    plain = KernelRequest(operator, (storage,), storage, "int8" if storage == "uint8" else storage)
    request, constants, values = anchors.random_case(np.random.default_rng(groups), plain)
    kernel = ANCHOR_FAMILIES[family].kernel(replace(request, shuffled=shuffled))
    assert kernel is not None
    assert ("last" in kernel.name) == (groups > 1)
    stored = anchors.run_kernel(kernel, constants, values, anchors.TARGETS[family])
    expected = numerics.evaluate(request, constants, values)
    np.testing.assert_array_equal(in_channel_order(kernel.request, stored), expected, kernel.name)
    assert np.array_equal(stored[..., 1], expected[..., 240 // shuffled])


@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_reference_kernels_store_shuffled(storage: str) -> None:
    """Plain loops write every channel where the shuffle puts it, and read a residual in order."""
    operator = Conv2D((1, 2, 3, 12), 18, Window((1, 1)), 3, Epilogue(True, True))
    plain = KernelRequest(operator, (storage, storage), storage, "int8" if storage == "uint8" else storage)
    request, constants, values = anchors.random_case(np.random.default_rng(0), plain)
    kernel = ReferenceFamily().kernel(replace(request, shuffled=6))
    assert kernel is not None
    stored = anchors.run_kernel(kernel, constants, values, anchors.TARGETS["portable"])
    expected = numerics.evaluate(request, constants, values)
    np.testing.assert_array_equal(in_channel_order(kernel.request, stored), expected)


@pytest.mark.parametrize("family", anchors.FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.sampled_from([2, 3, 4, 7, 8]),
    inputs=st.integers(1, 30),
    outputs=st.integers(4, 40),
    size=st.tuples(st.integers(1, 2), st.integers(2, 6), st.integers(2, 6)),
    window=st.sampled_from([Window((1, 1)), Window((1, 1), (2, 2)), Window((3, 2), padding=(1, 1, 1, 0))]),
    storage=st.sampled_from(["float32", "bfloat16", "float16"]),
    seed=st.integers(0, 2**31),
)
def test_shuffled_float_kernels_are_exact(family, groups, inputs, outputs, size, window, storage, seed) -> None:
    """Lanes that take turns among groups add in the contract's order; padding is left out."""
    operator = Conv2D((*size, inputs * groups), outputs * groups, window, groups, Epilogue(True, lower=0.0))
    plain = KernelRequest(operator, (storage,), storage, storage)
    request, constants, values = anchors.random_case(np.random.default_rng(seed), plain)
    kernel = ANCHOR_FAMILIES[family].kernel(replace(request, shuffled=groups))
    assert kernel is not None
    stored = anchors.run_kernel(kernel, constants, values, anchors.TARGETS[family])
    expected = numerics.evaluate(request, constants, values)
    np.testing.assert_array_equal(in_channel_order(kernel.request, stored), expected, kernel.name)


@pytest.mark.parametrize("family", anchors.families("avx512_vnni", "avx_vnni", "avx2", "portable"))
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    groups=st.sampled_from([2, 3, 4, 5, 8]),
    inputs=st.integers(4, 70),
    outputs=st.integers(8, 40),
    size=st.tuples(st.integers(1, 2), st.integers(2, 6), st.integers(2, 6)),
    window=st.sampled_from(
        [Window((1, 1)), Window((1, 1), (2, 2)), Window((2, 2)), Window((3, 2), padding=(1, 0, 1, 1))]
    ),
    limit=st.sampled_from([127, 64, 7]),
    storage=st.sampled_from(["uint8", "float32"]),
    seed=st.integers(0, 2**31),
)
def test_shuffled_kernels_are_exact(family, groups, inputs, outputs, size, window, limit, storage, seed) -> None:
    """Any number of channels, chains and what they leave, windows over several pixels: the contract's values, shuffled."""
    operator = Conv2D((*size, inputs * groups), outputs * groups, window, groups, Epilogue(True))
    rng = np.random.default_rng(seed)
    plain = KernelRequest(operator, ("uint8",), storage, "int8")
    request, constants, values = anchors.random_case(rng, plain, limit)
    kernel = ANCHOR_FAMILIES[family].kernel(replace(request, shuffled=groups))
    assert kernel is not None
    stored = anchors.run_kernel(kernel, constants, values, anchors.TARGETS[family])
    expected = numerics.evaluate(request, constants, values)
    np.testing.assert_array_equal(in_channel_order(kernel.request, stored), expected, kernel.name)
    if outputs > 1:
        assert np.array_equal(stored[..., 1], expected[..., outputs])


def test_channel_order_of_placed_outputs() -> None:
    """An output in a wider buffer is cut out; what is in order stays as it is."""
    operator = Conv2D((1, 1, 1, 8), 6, Window((1, 1)), 2)
    request = KernelRequest(operator, ("uint8",), "uint8", "int8")
    stored = np.arange(9, dtype=np.uint8).reshape(1, 1, 1, 9)
    placed = replace(request, placement=Placement(2, 9))
    assert in_channel_order(placed, stored).ravel().tolist() == [2, 3, 4, 5, 6, 7]
    assert in_channel_order(replace(request, shuffled=2), stored[..., :6]).ravel().tolist() == [0, 2, 4, 1, 3, 5]
