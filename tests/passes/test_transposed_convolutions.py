"""Transposed convolutions and channels laid out as pixels, from the model to one layer each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from tests.onnx_models import node, onnx_model, onnxruntime_outputs, random_inputs, random_weights
from tests.passes.test_canonicalize import verify
from tests.pipeline_checks import assert_deployed_as_simulated, import_model, uniform_plan
from tests.small_models import run_module, with_weights
from tvm_hquant.errors import ModelError
from tvm_hquant.frontend import import_onnx
from tvm_hquant.layers import LayerGraph, read_layers
from tvm_hquant.operators import Conv2D, Movement, Opaque
from tvm_hquant.passes.canonicalize import canonicalize
from tvm_hquant.preparation import prepare_module
from tvm_hquant.verification import verify_artifact


@I.ir_module
class Before:
    @R.function
    def main(
        x: R.Tensor((1, 3, 5, 4), "float32"),
        w: R.Tensor((3, 2, 4, 2), "float32"),
        b: R.Tensor((1, 2, 1, 1), "float32"),
    ) -> R.Tensor((1, 2, 10, 8), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            c = R.nn.conv2d_transpose(x, w, strides=[2, 2], padding=[1, 0, 1, 0])
            d = R.add(c, b)
            e = R.nn.relu(d)
            R.output(e)
        return e


@I.ir_module
class Expected:
    @R.function
    def main(
        x: R.Tensor((1, 3, 5, 4), "float32"),
        w: R.Tensor((8, 3, 2, 1), "float32"),
        b: R.Tensor((1, 8, 1, 1), "float32"),
    ) -> R.Tensor((1, 2, 10, 8), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            c = R.nn.conv2d(x, w, padding=[1, 0, 1, 0])
            d = R.add(c, b)
            e = R.nn.relu(d)
            split = R.reshape(e, (1, 2, 2, 2, 6, 4))
            moved = R.permute_dims(split, [0, 3, 4, 1, 5, 2])
            whole = R.reshape(moved, (1, 2, 12, 8))
            y = R.strided_slice(whole, [2], [1], [11], [1])
            R.output(y)
        return y


def test_transposed_convolution_is_a_convolution_and_pixels() -> None:
    """Bias and clamp go into the convolution; of columns, whose kernel is as long as its stride, nothing is cut off."""
    before = with_weights(Before, ["e"])
    after = verify(before, Expected)
    x = np.random.default_rng(1).normal(size=(1, 3, 5, 4)).astype("float32")
    np.testing.assert_allclose(run_module(after, x)[0], run_module(before, x)[0], rtol=1e-5, atol=1e-6)


@st.composite
def transposed_convolutions(draw: st.DrawFn, name: str) -> tuple[Any, dict[str, Any]]:
    """One of 6 channels on rows and columns that have nothing in common, and its weights."""
    pairs = [draw(st.tuples(st.integers(low, high), st.integers(low, high))) for low, high in ((1, 5), (1, 3), (1, 3))]
    kernel, strides, dilations = map(list, pairs)
    groups, out = draw(st.sampled_from([1, 2, 3, 6])), draw(st.integers(1, 3))
    extent = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    # As much as leaves two rows of the output.
    most = [(size - 1) * s + e - 2 for size, s, e in zip((4, 5), strides, extent, strict=True)]
    pads = [draw(st.integers(0, max(0, min(limit // 2, 4)))) for limit in most * 2]
    spare = [draw(st.integers(0, s - 1)) for s in strides]
    weights = random_weights(draw(st.integers(0, 99)), **{f"{name}w": (6, out, *kernel), f"{name}b": (out * groups,)})
    attributes = {"strides": strides, "dilations": dilations, "pads": pads, "output_padding": spare, "group": groups}
    return node("ConvTranspose", f"x {name}w {name}b", name, **attributes), weights


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(made=st.tuples(*(transposed_convolutions(f"y{i}") for i in range(16))))
def test_any_transposed_convolution_computes_what_it_did(made: tuple[Any, ...]) -> None:
    """Strides, kernels, dilations, pads on four sides, output padding and groups in any combination."""
    nodes, weights = [n for n, _ in made], {k: v for _, w in made for k, v in w.items()}
    model = onnx_model(nodes, weights, {"x": (2, 6, 4, 5)}, " ".join(n.output[0] for n in nodes))
    inputs = random_inputs(model)
    partitioned = prepare_module(model, {"x": (2, 6, 4, 5)})
    assert not [layer for layer in read_layers(partitioned).layers if isinstance(layer.operator, Opaque)]
    expected = onnxruntime_outputs(model, inputs)
    for attributes, found, wanted in zip(nodes, run_module(partitioned, *inputs.values()), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5, err_msg=str(attributes))


def layers_of(*nodes: Any, weights: dict[str, Any], **options: Any) -> tuple[LayerGraph, Any]:
    """The layers of a small model, whose outputs are compared with those of ONNX Runtime."""
    model = onnx_model(list(nodes), weights, **options)
    inputs = random_inputs(model)
    partitioned = prepare_module(model)
    for found, wanted in zip(
        run_module(partitioned, *inputs.values()), onnxruntime_outputs(model, inputs), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    return read_layers(partitioned), partitioned


def test_outputs_that_get_nothing_are_left_to_tvm() -> None:
    """Where the stride steps over all that is kept, outputs are zeros: there is no convolution of an empty map."""
    transposed = node("ConvTranspose", "x w", "y", strides=[3, 3], pads=[1, 1, 1, 1], output_padding=[2, 2])
    graph, _ = layers_of(transposed, weights=random_weights(w=(4, 6, 1, 1)), inputs={"x": (1, 4, 1, 1)})
    assert isinstance(graph.layers[-1].operator, Opaque)


def test_what_follows_the_pixels_is_folded() -> None:
    """A batch norm, a scale for each channel and a clamp behind a transposed convolution cost nothing."""
    weights = random_weights(w=(4, 3, 3, 3), **dict.fromkeys(("g", "s", "m", "v_variance"), (6,)), t=(6, 1, 1))
    graph, _ = layers_of(
        node("ConvTranspose", "x w", "c", strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1], group=2),
        node("BatchNormalization", "c g s m v_variance", "n"),
        node("Mul", "n t", "k"),
        node("Relu", "k", "y"),
        weights=weights,
    )
    _, convolution, pixels, _ = [layer.operator for layer in graph.layers]
    assert isinstance(convolution, Conv2D)
    assert (convolution.window.kernel, convolution.groups, convolution.epilogue.lower) == ((2, 2), 2, 0.0)
    assert pixels == Movement("depth_to_space", (1, 8, 8, 24), (1, 16, 16, 6), (2, 2, 2, 0, 0))


@pytest.mark.parametrize(("mode", "block"), [("DCR", (1, 2, 2)), ("CRD", (4, 2, 2))])
def test_depth_to_space_is_one_layer(mode: str, block: tuple[int, int, int]) -> None:
    """Both orders of ONNX; the additions behind go into the convolution."""
    graph, _ = layers_of(
        node("Conv", "x w", "c"),
        node("DepthToSpace", "c", "d", blocksize=2, mode=mode),
        node("Add", "d b", "y"),
        weights=random_weights(w=(16, 4, 1, 1), b=(4, 1, 1)),
    )
    operators = [layer.operator for layer in graph.layers]
    assert operators[2] == Movement("depth_to_space", (1, 8, 8, 16), (1, 16, 16, 4), (*block, 0, 0))
    assert len(operators) == 4


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_one_channel_of_pixels_is_one_layer(mode: str) -> None:
    """The axis of the channel may lie anywhere."""
    graph, _ = layers_of(
        node("Conv", "x w", "c"),
        node("DepthToSpace", "c", "d", blocksize=3, mode=mode),
        node("Conv", "d v", "y"),
        weights=random_weights(w=(9, 4, 1, 1), v=(2, 1, 3, 3)),
    )
    (pixels,) = (layer.operator for layer in graph.layers if layer.operator_kind == "depth_to_space")
    assert pixels == Movement("depth_to_space", (1, 8, 8, 9), (1, 24, 24, 1), (1, 3, 3, 0, 0))


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_one_channel_of_pixels_at_an_output_is_moved_once(mode: str) -> None:
    """What a network for super-resolution ends with: a move of pixels, and another view of them for the model's order."""
    weights = random_weights(w=(9, 4, 1, 1))
    nodes = [node("Conv", "x w", "c"), node("DepthToSpace", "c", "y", blocksize=3, mode=mode)]
    graph, _ = layers_of(*nodes, weights=weights)
    pixels, view = (layer.operator for layer in graph.layers[2:])
    assert pixels == Movement("depth_to_space", (1, 8, 8, 9), (1, 24, 24, 1), (1, 3, 3, 0, 0))
    assert view == Movement("reshape", (1, 24, 24, 1), (1, 1, 24, 24))
    model = onnx_model(nodes, weights)
    imported = import_model(model, random_inputs(model))
    assert_deployed_as_simulated(imported, uniform_plan(imported.session, "a8w8"))


@pytest.mark.parametrize(("out", "group", "groups"), [(1, 1, 1), (1, 4, 4)])
def test_groups_of_one_channel_are_one_layer(out: int, group: int, groups: int) -> None:
    """A mask of one channel, and upsampling of each channel by itself."""
    graph, _ = layers_of(
        node("ConvTranspose", "x w", "y", strides=[2, 2], pads=[1, 1, 1, 1], group=group),
        weights=random_weights(w=(4, out, 4, 4)),
    )
    (pixels,) = (layer.operator for layer in graph.layers if layer.operator_kind == "depth_to_space")
    assert pixels == Movement("depth_to_space", (1, 9, 9, 4 * groups), (1, 16, 16, groups), (groups, 2, 2, 1, 1))


def test_sequences_are_transposed_too() -> None:
    """One row of pixels is moved by nothing but another view of it."""
    graph, _ = layers_of(
        node("ConvTranspose", "x w b", "c", strides=[2], pads=[1, 1]),
        node("Relu", "c", "y"),
        weights=random_weights(w=(4, 3, 4), b=(3,)),
        inputs={"x": (1, 4, 9)},
    )
    assert [layer.operator_kind for layer in graph.layers if layer.is_anchor] == ["conv2d"]
    assert not [layer for layer in graph.layers if isinstance(layer.operator, Opaque)]


def test_weights_that_are_computed_are_left_to_tvm() -> None:
    """The reason names what is wrong with the layer."""
    nodes = [node("Conv", "x v", "c"), node("ConvTranspose", "x c", "y", strides=[2, 2])]
    model = onnx_model(nodes, random_weights(v=(4, 4, 1, 1)), {"x": (4, 4, 3, 3)})
    session = import_model(model, random_inputs(model)).session
    decision = uniform_plan(session, "a8w8").layers["conv2d_transpose_0"]
    assert (decision.precision, decision.reason) == ("float32", "no kernel")
    assert decision.detail == "nn.conv2d_transpose whose weights other layers compute is left to TVM, in float32"


def test_unet_is_8_bits_inside() -> None:
    """Two transposed convolutions write into the buffers of their concatenations; the module equals the simulator."""
    shapes = {"e": (8, 4, 3, 3), "l": (16, 8, 3, 3), "m": (16, 16, 3, 3), "u": (16, 8, 2, 2), "d": (16, 16, 3, 3)}
    shapes |= {"v": (16, 8, 4, 4), "o": (3, 16, 1, 1), "b": (8,)}
    weights = {n: v / np.float32(np.sqrt(v[0].size)) for n, v in random_weights(4, **shapes).items()}
    same, half = {"pads": [1, 1, 1, 1]}, {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        *(node("Conv", "x e", "e0", **same), node("Relu", "e0", "top"), node("MaxPool", "top", "p", **half)),
        *(node("Conv", "p l", "l0", **same), node("Relu", "l0", "middle"), node("MaxPool", "middle", "q", **half)),
        *(node("Conv", "q m", "m0", **same), node("Relu", "m0", "low")),
        *(node("ConvTranspose", "low u b", "up", strides=[2, 2]), node("Concat", "up middle", "j", axis=1)),
        node("Conv", "j w", "d0", **same),
        node("Relu", "d0", "dr"),
        node("ConvTranspose", "dr v", "v0", strides=[2, 2], **same),
        node("Relu", "v0", "vr"),
        node("Concat", "vr top", "k", axis=1),
        node("Conv", "k o", "y"),
    ]
    weights["w"] = random_weights(5, w=(16, 24, 3, 3))["w"] / np.float32(10)
    model = onnx_model(nodes, weights, {"x": (1, 4, 16, 16)})
    imported = import_model(model, random_inputs(model))
    plan = uniform_plan(imported.session, "a8w8")
    program = imported.session.builder.program(plan.precisions(), plan.scales)
    assert [c.kind for c in program.conversions if c.kind in ("quantize", "dequantize")] == ["quantize"]
    artifact = assert_deployed_as_simulated(imported, plan)
    report = verify_artifact(artifact)
    assert report.holds
    kernels = {check.layer: check.kernel for check in report.checks}
    assert [kernels["concat_0"], kernels["concat_1"]] == ["in place", "in place"]


def test_shapes_that_the_importer_leaves_out_are_refused() -> None:
    """TVM's importer would give an output of another size without a word."""
    upsampled = node("ConvTranspose", "x w", "y", strides=[2, 2], output_shape=[16, 16])
    with pytest.raises(ModelError, match=r"output_shape of ConvTranspose \(node node_y\)"):
        import_onnx(onnx_model([upsampled], random_weights(w=(4, 3, 3, 3))))


def test_applying_it_twice_changes_nothing() -> None:
    """The canonical form of a transposed convolution is its own canonical form."""
    once = canonicalize()(
        import_onnx(onnx_model([node("ConvTranspose", "x w", "y", strides=[2, 2])], random_weights(w=(4, 3, 3, 3))))
    )
    tvm.ir.assert_structural_equal(canonicalize()(once), once)
