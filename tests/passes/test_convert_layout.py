"""convert_layout: structure before and after, real networks against ONNX Runtime, names of weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from tvm import IRModule
from tvm.script import ir as I
from tvm.script import relax as R

from tests.light_models import light_model_path
from tests.onnx_models import onnxruntime_outputs, random_inputs, zoo_model
from tests.small_models import run_module, with_weights
from tvm_hquant.frontend import import_onnx, input_signature, output_signature
from tvm_hquant.passes.canonicalize import canonicalize
from tvm_hquant.passes.convert_layout import convert_layout
from tvm_hquant.relax_ir.local_response_normalization import find_local_response_normalizations
from tvm_hquant.relax_ir.main_function import read_main


@I.ir_module
class FlattenBefore:
    @R.function
    def main(
        x: R.Tensor((1, 3, 4, 6), "float32"),
        w: R.Tensor((5, 3, 3, 3), "float32"),
        b: R.Tensor((1, 5, 1, 1), "float32"),
        head: R.Tensor((40, 7), "float32"),
    ) -> R.Tensor((1, 7), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            c = R.nn.conv2d(x, w)
            d = R.add(c, b)
            e = R.reshape(d, (1, 40))
            f = R.matmul(e, head)
            R.output(f)
        return f


@I.ir_module
class FlattenExpected:
    @R.function
    def main(
        x: R.Tensor((1, 3, 4, 6), "float32"),
        w: R.Tensor((5, 3, 3, 3), "float32"),
        b: R.Tensor((1, 1, 1, 5), "float32"),
        head: R.Tensor((40, 7), "float32"),
    ) -> R.Tensor((1, 7), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.permute_dims(x, [0, 2, 3, 1])
            c = R.nn.conv2d(a, w, data_layout="NHWC", kernel_layout="OIHW")
            d = R.add(c, b)
            e = R.reshape(d, (1, 40))
            f = R.matmul(e, head)
            R.output(f)
        return f


@I.ir_module
class PixelsBefore:
    @R.function
    def main(x: R.Tensor((2, 3, 4, 5), "float32"), w: R.Tensor((6, 3, 1, 1), "float32")) -> R.Tensor(
        (2, 1, 8, 15), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            c = R.nn.conv2d(x, w)
            d = R.reshape(c, (2, 1, 2, 3, 4, 5))
            e = R.permute_dims(d, [0, 1, 4, 2, 5, 3])
            f = R.reshape(e, (2, 1, 8, 15))
            R.output(f)
        return f


@I.ir_module
class PixelsExpected:
    @R.function
    def main(x: R.Tensor((2, 3, 4, 5), "float32"), w: R.Tensor((6, 3, 1, 1), "float32")) -> R.Tensor(
        (2, 1, 8, 15), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.permute_dims(x, [0, 2, 3, 1])
            c = R.nn.conv2d(a, w, data_layout="NHWC", kernel_layout="OIHW")
            d = R.reshape(c, (2, 4, 5, 1, 2, 3))
            e = R.permute_dims(d, [0, 1, 4, 2, 5, 3])
            f = R.reshape(e, (2, 8, 15, 1))
            g = R.reshape(f, (2, 1, 8, 15))
            R.output(g)
        return g


@I.ir_module
class AxesBefore:
    @R.function
    def main(x: R.Tensor((1, 4, 6, 5), "float32"), s: R.Tensor((4, 1, 1), "float32")) -> R.Tensor(
        (1, 8, 3, 5), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.nn.max_pool2d(x, pool_size=(1, 1))
            b = R.take(a, R.const([3, 2, 1, 0], "int64"), axis=1, mode="clip")
            c = R.nn.pad(b, [0, 0, 1, 2, 0, 0, 3, 4])
            d = R.strided_slice(c, axes=[1, 2, 3], begin=[1, 0, 3], end=[5, 6, 8], strides=[1, 2, 1])
            e = R.multiply(d, s)
            f = R.concat([d, e], axis=1)
            g = R.nn.softmax(f, axis=1)
            R.output(g)
        return g


@I.ir_module
class AxesExpected:
    @R.function
    def main(x: R.Tensor((1, 4, 6, 5), "float32"), s: R.Tensor((1, 1, 1, 4), "float32")) -> R.Tensor(
        (1, 8, 3, 5), "float32"
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            p = R.permute_dims(x, [0, 2, 3, 1])
            a = R.nn.max_pool2d(p, pool_size=(1, 1), layout="NHWC")
            b = R.take(a, R.const([3, 2, 1, 0], "int64"), axis=3, mode="clip")
            c = R.nn.pad(b, [0, 0, 0, 0, 3, 4, 1, 2])
            d = R.strided_slice(c, axes=[1, 2, 3], begin=[0, 3, 1], end=[6, 8, 5], strides=[2, 1, 1])
            e = R.multiply(d, s)
            f = R.concat([d, e], axis=3)
            g = R.nn.softmax(f, axis=3)
            h = R.permute_dims(g, [0, 3, 1, 2])
            R.output(h)
        return h


@I.ir_module
class TwoOutputsBefore:
    @R.function
    def main(x: R.Tensor((1, 4, 6, 5), "float32"), y: R.Tensor((1, 4, 6, 5), "float32")) -> R.Tuple(
        R.Tensor((1, 4, 6, 5), "float32"), R.Tensor((1, 4, 1, 1), "float32")
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            a = R.nn.avg_pool2d(x, pool_size=(3, 3), padding=(1, 1, 1, 1))
            b = R.add(a, y)
            c = R.mean(b, axis=[2, 3], keepdims=True)
            d = (b, c)
            R.output(d)
        return d


@I.ir_module
class TwoOutputsExpected:
    @R.function
    def main(x: R.Tensor((1, 4, 6, 5), "float32"), y: R.Tensor((1, 4, 6, 5), "float32")) -> R.Tuple(
        R.Tensor((1, 4, 6, 5), "float32"), R.Tensor((1, 4, 1, 1), "float32")
    ):
        R.func_attr({"num_input": 2})
        with R.dataflow():
            p = R.permute_dims(x, [0, 2, 3, 1])
            a = R.nn.avg_pool2d(p, pool_size=(3, 3), padding=(1, 1, 1, 1), layout="NHWC")
            q = R.permute_dims(y, [0, 2, 3, 1])
            b = R.add(a, q)
            c = R.mean(b, axis=[1, 2], keepdims=True)
            e = R.permute_dims(b, [0, 3, 1, 2])
            f = R.reshape(c, (1, 4, 1, 1))
            d = (e, f)
            R.output(d)
        return d


@I.ir_module
class NormalizationsBefore:
    @R.function
    def main(
        x: R.Tensor((1, 4, 6, 5), "float32"),
        gamma: R.Tensor((4,), "float32"),
        beta: R.Tensor((4,), "float32"),
    ) -> R.Tensor((1, 6, 5, 4), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.nn.avg_pool2d(x, pool_size=(3, 3), padding=(1, 1, 1, 1))
            b = R.nn.group_norm(a, gamma, beta, num_groups=2, channel_axis=1, axes=[2, 3], epsilon=0.001)
            c = R.permute_dims(b, [0, 2, 3, 1])
            d = R.nn.layer_norm(c, gamma, beta, axes=[-1], epsilon=0.01)
            R.output(d)
        return d


@I.ir_module
class NormalizationsExpected:
    @R.function
    def main(
        x: R.Tensor((1, 4, 6, 5), "float32"),
        gamma: R.Tensor((4,), "float32"),
        beta: R.Tensor((4,), "float32"),
    ) -> R.Tensor((1, 6, 5, 4), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            p = R.permute_dims(x, [0, 2, 3, 1])
            a = R.nn.avg_pool2d(p, pool_size=(3, 3), padding=(1, 1, 1, 1), layout="NHWC")
            b = R.nn.group_norm(a, gamma, beta, num_groups=2, channel_axis=3, axes=[1, 2], epsilon=0.001)
            d = R.nn.layer_norm(b, gamma, beta, axes=[-1], epsilon=0.01)
            R.output(d)
        return d


def bare(mod: IRModule) -> IRModule:
    """The module without the values of its weights and the names of its inputs and outputs."""
    result = mod.clone()
    for attribute in ("params", "hquant.inputs", "hquant.outputs"):
        result["main"] = result["main"].without_attr(attribute)
    return result


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (FlattenBefore, FlattenExpected),
        (PixelsBefore, PixelsExpected),
        (AxesBefore, AxesExpected),
        (TwoOutputsBefore, TwoOutputsExpected),
        (NormalizationsBefore, NormalizationsExpected),
    ],
    ids=["flatten_before_dense", "pixels_of_one_channel", "axes", "two_outputs", "normalizations"],
)
def test_structure_and_outputs(before: IRModule, expected: IRModule) -> None:
    """Each operator is written for channels-last feature maps, and computes what it did before."""
    before = with_weights(before, ["output"])
    after = convert_layout()(before)
    tvm.ir.assert_structural_equal(bare(after), bare(with_weights(expected, ["output"])))
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=[int(d) for d in p.ty.shape]).astype(np.float32) for p in read_main(before).inputs]
    for found, wanted in zip(run_module(after, *inputs), run_module(before, *inputs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_rows_of_dense_weights_follow_the_flattened_feature_map() -> None:
    """The k-th stored feature (row, column, channel) meets the weights' row of the feature it is."""
    before = with_weights(FlattenBefore, ["f"])
    after = convert_layout()(before)
    old, new = (next(v for w, v in read_main(m).weights.items() if w.name == "head") for m in (before, after))
    np.testing.assert_array_equal(new, old.reshape(5, 2, 4, 7).transpose(1, 2, 0, 3).reshape(40, 7))


@pytest.mark.parametrize(
    "name",
    ["kws_dscnn", "cifar10_resnet8_mlperftiny", "cifar10_resnet20", "cifar10_shufflenetv1", "vww_mobilenetv1_0.25"],
)
def test_real_networks_keep_their_outputs(name: str) -> None:
    """Trained networks compute what ONNX Runtime computes, with their own names and shapes at the ends."""
    path = zoo_model(name)
    model = onnx.load(path)
    imported = import_onnx(path)
    after = convert_layout()(canonicalize()(imported))
    assert input_signature(after) == input_signature(imported)
    assert output_signature(after) == output_signature(imported)
    inputs = random_inputs(model)
    expected = onnxruntime_outputs(model, inputs)[0]
    found = run_module(after, *inputs.values())[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_names_of_weights_survive() -> None:
    """Every convolution still reads a weight that the file names (TVM's importer drops PyTorch's prefix ``onnx::``)."""
    path = zoo_model("cifar10_resnet20")
    after = convert_layout()(canonicalize()(import_onnx(path)))
    names = {w.name for w in read_main(after).weights}
    assert names <= {i.name.removeprefix("onnx::") for i in onnx.load(path).graph.initializer}
    assert len(names) == 2 * 20


def test_local_response_normalization_is_found() -> None:
    """Both normalizations of Inception v1 are recognised with the numbers of the ONNX nodes."""
    mod = convert_layout()(canonicalize()(import_onnx(light_model_path("inception_v1"))))
    found = find_local_response_normalizations(read_main(mod).bindings)
    assert [(f.operator.shape, f.operator.size, f.operator.beta, f.operator.bias) for f in found] == [
        ((1, 55, 55, 64), 5, 0.75, 1.0),
        ((1, 55, 55, 192), 5, 0.75, 1.0),
    ]
    assert all(f.operator.alpha == pytest.approx(1e-4) and len(f.indices) == 8 for f in found)
