"""Layers are what the project decides about: protects their borders, their names, and that none is merged or lost."""

from __future__ import annotations

import numpy as np
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from tests.onnx_models import node, onnx_model, random_weights
from tests.small_models import residual_module, run_module, with_weights
from tvm_hquant import api
from tvm_hquant.layers import read_layers
from tvm_hquant.operator_codec import encode
from tvm_hquant.operators import Add, BatchMatmul, Conv2D, Dense, Epilogue, Multiply, Opaque, Window
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.precision import A8W8, FLOAT32
from tvm_hquant.quantizer import low_bit_share


def test_conv_takes_bias_residual_and_clamp() -> None:
    """The epilogue that kernels fuse is exactly what ends up in the layer."""
    graph = read_layers(partition_layers()(residual_module()))
    conv1, conv2 = graph.by_name["conv1_weight"[:5]], graph.by_name["conv2"]
    assert conv1.operator == Conv2D(
        (1, 8, 8, 3), 8, Window((3, 3), padding=(1, 1, 1, 1)), 1, Epilogue(True, False, 0.0)
    )
    assert conv2.operator.epilogue == Epilogue(False, True, 0.0)
    assert conv2.inputs == ("conv1", "conv1")
    assert graph.by_name["head"].operator == Dense(1, 8, 10, Epilogue(True))


def test_main_only_calls_layers() -> None:
    """Structure of the whole module: one private function per layer, named after the weight."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 4, 4, 2), "float32"), stem_weight: R.Tensor((2, 2, 1, 1), "float32")) -> R.Tensor(
            (1, 4, 4, 2), "float32"
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                conv = R.nn.conv2d(x, stem_weight, data_layout="NHWC", kernel_layout="OIHW")
                clipped = R.clip(conv, 0, 6)
                R.output(clipped)
            return clipped

    before = with_weights(Before, ["y"])
    weight = before["main"].attrs["params"][0]
    operator = encode(Conv2D((1, 4, 4, 2), 2, Window((1, 1)), 1, Epilogue(False, False, 0.0, 6.0)))

    @I.ir_module
    class Expected:
        @R.function(private=True)
        def stem(input_0: R.Tensor((1, 4, 4, 2), "float32")) -> R.Tensor((1, 4, 4, 2), "float32"):
            R.func_attr({"hquant.layer": "stem", "hquant.operator": operator})
            with R.dataflow():
                conv = R.nn.conv2d(input_0, R.const(weight), data_layout="NHWC", kernel_layout="OIHW")
                clipped = R.clip(conv, 0, 6)
                gv: R.Tensor((1, 4, 4, 2), "float32") = clipped
                R.output(gv)
            return gv

        @R.function
        def main(x: R.Tensor((1, 4, 4, 2), "float32")) -> R.Tensor((1, 4, 4, 2), "float32"):
            R.func_attr({"hquant.inputs": ["x"], "hquant.outputs": ["y"]})
            cls = Expected
            with R.dataflow():
                stem: R.Tensor((1, 4, 4, 2), "float32") = cls.stem(x)
                gv: R.Tensor((1, 4, 4, 2), "float32") = stem
                R.output(gv)
            return gv

    tvm.ir.assert_structural_equal(partition_layers()(before), Expected)


def test_residual_behind_an_activation_is_a_layer_of_its_own() -> None:
    """The contract fuses a residual only where no activation lies between the sums and the addition."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 4, 4, 2), "float32"), w: R.Tensor((2, 2, 1, 1), "float32")) -> R.Tensor(
            (1, 4, 4, 2), "float32"
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                conv = R.nn.conv2d(x, w, data_layout="NHWC", kernel_layout="OIHW")
                relu = R.nn.relu(conv)
                total = R.add(relu, x)
                relu2 = R.nn.relu(total)
                R.output(relu2)
            return relu2

    graph = read_layers(partition_layers()(with_weights(Before, ["y"])))
    assert [layer.operator for layer in graph.layers] == [
        Conv2D((1, 4, 4, 2), 2, Window((1, 1)), 1, Epilogue(False, False, 0.0)),
        Add((1, 4, 4, 2), 0.0),
    ]


def test_equal_layers_stay_apart() -> None:
    """Two layers of one shape keep their own functions, names and weights."""

    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 4, 4, 2), "float32"),
            a_weight: R.Tensor((2, 2, 1, 1), "float32"),
            b_weight: R.Tensor((2, 2, 1, 1), "float32"),
        ) -> R.Tensor((1, 4, 4, 2), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                a = R.nn.conv2d(x, a_weight, data_layout="NHWC", kernel_layout="OIHW")
                b = R.nn.conv2d(a, b_weight, data_layout="NHWC", kernel_layout="OIHW")
                R.output(b)
            return b

    graph = read_layers(partition_layers()(with_weights(Before, ["y"])))
    assert [layer.name for layer in graph.layers] == ["a", "b"]
    assert not np.array_equal(graph.layers[0].weights, graph.layers[1].weights)


def test_attention_takes_permutations_and_scale() -> None:
    """Products of activations read and write through the permutations around them; no copy and no factor is left."""

    @I.ir_module
    class Before:
        @R.function
        def main(
            q: R.Tensor((1, 5, 2, 8), "float32"),
            k: R.Tensor((1, 5, 2, 8), "float32"),
            v: R.Tensor((1, 5, 2, 8), "float32"),
        ) -> R.Tensor((1, 5, 2, 8), "float32"):
            R.func_attr({"num_input": 3})
            with R.dataflow():
                queries = R.permute_dims(q, [0, 2, 1, 3])
                keys = R.permute_dims(k, [0, 2, 3, 1])
                products = R.matmul(queries, keys)
                scaled = R.divide(products, R.const(4.0, "float32"))
                attention = R.nn.softmax(scaled, axis=-1)
                values = R.permute_dims(v, [0, 2, 1, 3])
                mixed = R.matmul(attention, values)
                y = R.permute_dims(mixed, [0, 2, 1, 3])
                R.output(y)
            return y

    before = with_weights(Before, ["y"])
    partitioned = partition_layers()(before)
    graph = read_layers(partitioned)
    split, swapped, plain = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 2, 3)
    assert [layer.name for layer in graph.layers] == ["matmul_0", "softmax_0", "matmul_1"]
    assert graph.layers[0].operator == BatchMatmul(((1, 5, 2, 8),) * 2, (split, swapped), plain, 0.25)
    assert graph.layers[2].operator == BatchMatmul(((1, 2, 5, 5), (1, 5, 2, 8)), (plain, split), split)
    inputs = [np.random.default_rng(seed).normal(size=(1, 5, 2, 8)).astype("float32") for seed in range(3)]
    np.testing.assert_allclose(run_module(before, *inputs)[0], run_module(partitioned, *inputs)[0], rtol=1e-6)


def test_a_product_of_a_tensor_with_itself_keeps_its_permutation_apart() -> None:
    """Both matrices come from one tensor but are read in different codes: they must not change places."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3, 4), "float32")) -> R.Tensor((2, 3, 3), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                turned = R.permute_dims(x, [0, 2, 1])
                y = R.matmul(x, turned)
                R.output(y)
            return y

    graph = read_layers(partition_layers()(with_weights(Before, ["y"])))
    assert [(layer.operator_kind, layer.inputs) for layer in graph.layers] == [
        ("permute_dims", ("x",)),
        ("batch_matmul", ("x", "permute_dims_0")),
    ]


def test_unknown_operators_are_opaque_and_tuples_are_taken_apart() -> None:
    """What is not recognised still becomes a layer, so that every operator has a name and a reason."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 6), "float32")) -> R.Tensor((2, 3), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                parts = R.split(x, 2, axis=1)
                first = parts[0]
                second = parts[1]
                product = R.multiply(first, second)
                R.output(product)
            return product

    before = with_weights(Before, ["y"])
    partitioned = partition_layers()(before)
    graph = read_layers(partitioned)
    assert [layer.operator for layer in graph.layers] == [
        Opaque("relax.split", ((2, 6),), (2, 3)),
        Opaque("relax.split", ((2, 6),), (2, 3)),
        Multiply(((2, 3), (2, 3))),
    ]
    x = np.arange(12, dtype="float32").reshape(2, 6)
    np.testing.assert_array_equal(run_module(before, x)[0], run_module(partitioned, x)[0])


def test_products_that_only_tvm_computes_count_their_work() -> None:
    """A 3D convolution and its transpose are multiply-accumulates like any other, in float32."""
    weights = random_weights(w=(2, 5, 3, 3, 3), v=(3, 2, 2, 2, 2))
    inputs = {"x": (1, 2, 4, 5, 6)}
    transposed = onnx_model([node("ConvTranspose", "x w", "y", strides=[2, 2, 2])], weights, inputs)
    spatial = onnx_model([node("Conv", "x v", "y")], weights, inputs)
    for model, macs in ((transposed, 240 * 5 * 27), (spatial, 3 * 4 * 5 * 3 * 2 * 8)):
        graph = api.open_session(model, "host").graph
        (layer,) = (layer for layer in graph.layers if isinstance(layer.operator, Opaque))
        assert layer.macs == macs
        others = {other.name: A8W8 for other in graph.layers}
        assert low_bit_share(graph.layers, {**others, layer.name: FLOAT32}) == 0.0
        assert low_bit_share(graph.layers, others) == 1.0


def test_same_values_before_and_after() -> None:
    """Partitioning changes no value."""
    before = residual_module()
    x = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype("float32")
    after = partition_layers()(before)
    np.testing.assert_allclose(run_module(after, x)[0], run_module(before, x)[0], rtol=1e-6)
    assert "params" in before["main"].attrs, "the caller's module was edited"
