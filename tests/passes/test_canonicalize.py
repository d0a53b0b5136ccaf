"""canonicalize: what it leaves of each spelling, that it changes no output, and how it names weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import IRModule
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.canonical_cases import Case, all_cases
from tests.canonical_elementwise_cases import elementwise_cases
from tests.light_models import light_model_path
from tests.onnx_models import (
    node,
    onnx_model,
    onnxruntime_outputs,
    random_inputs,
    random_weights,
    zoo_model,
)
from tests.small_models import run_module, with_weights
from tvm_hquant.errors import ModelError
from tvm_hquant.frontend import import_onnx
from tvm_hquant.passes.canonicalize import canonicalize
from tvm_hquant.passes.convert_layout import convert_layout
from tvm_hquant.relax_ir.describe import operator_name
from tvm_hquant.relax_ir.main_function import read_main


def operators(mod: IRModule) -> list[str]:
    """Names of all operators in ``main``, sorted, without their namespace where that leaves no doubt."""
    names = [operator_name(v).removeprefix("relax.") or type(v).__name__ for _, v in read_main(mod).bindings]
    return sorted(n.removeprefix("nn.") if n in ("nn.conv2d", "nn.avg_pool3d") else n for n in names)


def weights_of(mod: IRModule) -> dict[str, Any]:
    return {v.name: values for v, values in read_main(mod).weights.items()}


def verify(before: IRModule, expected: IRModule) -> IRModule:
    """Applies the pass, compares the structure without the weights' values, and returns the module."""
    after = canonicalize()(before)
    bare = after.clone()
    bare["main"] = bare["main"].without_attr("params")
    wanted = with_weights(expected, [])
    wanted["main"] = wanted["main"].without_attr("params").without_attr("hquant.inputs").without_attr("hquant.outputs")
    bare["main"] = bare["main"].without_attr("hquant.inputs").without_attr("hquant.outputs")
    tvm.ir.assert_structural_equal(bare, wanted)
    return after


def test_normalization_of_operators_is_one_call() -> None:
    """As exporters write it, with its scale and shift behind it, which become gamma and beta."""

    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((2, 3, 4), "float32"), gamma: R.Tensor((4,), "float32"), beta: R.Tensor((4,), "float32")
        ) -> R.Tensor((2, 3, 4), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                mean = R.mean(x, axis=[-1], keepdims=True)
                deviation = R.subtract(x, mean)
                square = R.power(deviation, R.const(2.0, "float32"))
                variance = R.mean(square, axis=[-1], keepdims=True)
                positive = R.add(variance, R.const(0.5, "float32"))
                root = R.sqrt(positive)
                normal = R.divide(deviation, root)
                scaled = R.multiply(normal, gamma)
                y = R.add(scaled, beta)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((2, 3, 4), "float32"), gamma: R.Tensor((4,), "float32"), beta: R.Tensor((4,), "float32")
        ) -> R.Tensor((2, 3, 4), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.nn.layer_norm(x, gamma, beta, axes=[2], epsilon=0.5)
                R.output(y)
            return y

    before = with_weights(Before, ["y"])
    after = verify(before, Expected)
    x = np.random.default_rng(0).normal(2.0, 1.0, (2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(run_module(after, x)[0], run_module(before, x)[0], rtol=1e-5, atol=1e-6)


def test_factors_move_behind_products_of_activations() -> None:
    """A number that scales queries before they are turned, and one index that is taken: neither keeps a product in float."""

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 3, 4), "float32"), k: R.Tensor((3, 4), "float32")) -> R.Tensor((3, 3), "float32"):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                q = R.take(x, R.const(1, "int64"), axis=0)
                scaled = R.multiply(q, R.const(0.5, "float32"))
                doubled = R.multiply(k, R.const(2.0, "float32"))
                turned = R.permute_dims(doubled, [1, 0])
                y = R.matmul(scaled, turned)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 3, 4), "float32"), k: R.Tensor((3, 4), "float32")) -> R.Tensor((3, 3), "float32"):
            R.func_attr({"num_input": 2})
            with R.dataflow():
                sliced = R.strided_slice(x, [0], [1], [2], [1])
                q = R.reshape(sliced, R.shape([3, 4]))
                turned = R.permute_dims(k, [1, 0])
                product = R.matmul(q, turned)
                doubled = R.multiply(product, R.const(2.0, "float32"))
                y = R.multiply(doubled, R.const(0.5, "float32"))
                R.output(y)
            return y

    before = with_weights(Before, ["y"])
    after = verify(before, Expected)
    rng = np.random.default_rng(3)
    inputs = [rng.normal(size=shape).astype("float32") for shape in ((2, 3, 4), (3, 4))]
    np.testing.assert_allclose(run_module(after, *inputs)[0], run_module(before, *inputs)[0], rtol=1e-6)


@I.ir_module
class BatchNormBefore:
    @R.function
    def main(
        x: R.Tensor((1, 3, 8, 8), "float32"),
        w: R.Tensor((4, 3, 3, 3), "float32"),
        gamma: R.Tensor((4,), "float32"),
        beta: R.Tensor((4,), "float32"),
        mean: R.Tensor((4,), "float32"),
        variance: R.Tensor((4,), "float32"),
    ) -> R.Tensor((1, 4, 6, 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            c = R.nn.conv2d(x, w)
            n = R.nn.batch_norm(c, gamma, beta, mean, variance, axis=1, training=False)
            y = n[0]
            r = R.nn.relu6(y)
            R.output(r)
        return r


@I.ir_module
class BatchNormExpected:
    @R.function
    def main(
        x: R.Tensor((1, 3, 8, 8), "float32"),
        w: R.Tensor((4, 3, 3, 3), "float32"),
        b: R.Tensor((1, 4, 1, 1), "float32"),
    ) -> R.Tensor((1, 4, 6, 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            c = R.nn.conv2d(x, w)
            y = R.add(c, b)
            r = R.clip(y, T.float64(0), T.float64(6))
            R.output(r)
        return r


@I.ir_module
class MovementBefore:
    @R.function
    def main(x: R.Tensor((1, 6, 4, 4), "float32")) -> R.Tensor((1, 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            a = R.reshape(x, (1, 2, 3, 4, 4))
            b = R.permute_dims(a, [0, 2, 1, 3, 4])
            c = R.reshape(b, (1, 6, 4, 4))
            d = R.mean(c, axis=[3, 2], keepdims=False)
            e = R.expand_dims(d, [2])
            f = R.squeeze(e, [2])
            unused = R.nn.relu(x)  # noqa: F841
            R.output(f)
        return f


@I.ir_module
class MovementExpected:
    @R.function
    def main(x: R.Tensor((1, 6, 4, 4), "float32")) -> R.Tensor((1, 6), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            c = R.take(x, R.const([0, 3, 1, 4, 2, 5], "int64"), axis=1, mode="clip")
            d = R.mean(c, axis=[2, 3], keepdims=True)
            f = R.reshape(d, (1, 6))
            R.output(f)
        return f


def test_batch_norm_becomes_weights_and_bias() -> None:
    """The structure, the numbers (against the formula in float64) and the names of a folded batch norm."""
    before = with_weights(BatchNormBefore, ["r"])
    positive = [*list(before["main"].attrs["params"])[:4], tvm.runtime.tensor(np.array([0.1, 1, 2, 9], np.float32))]
    before["main"] = before["main"].with_attr("params", positive)
    after = verify(before, BatchNormExpected)
    old, new = weights_of(before), weights_of(after)
    assert list(new) == ["w", "w.bias"]
    scale = old["gamma"].astype(np.float64) / np.sqrt(old["variance"].astype(np.float64) + 1e-5)
    np.testing.assert_array_equal(new["w"], (old["w"] * scale[:, None, None, None]).astype(np.float32))
    bias = (old["beta"] - old["mean"] * scale).astype(np.float32)
    np.testing.assert_array_equal(new["w.bias"].reshape(-1), bias)


def test_movement_has_one_spelling() -> None:
    """Channel shuffle, unordered reduction axes, squeeze and expand_dims, dead code."""
    verify(with_weights(MovementBefore, ["f"]), MovementExpected)


def test_the_given_module_is_not_changed() -> None:
    """A caller may go on using what it passed in."""
    before = with_weights(MovementBefore, ["f"])
    copy = before.clone()
    canonicalize()(before)
    tvm.ir.assert_structural_equal(before, copy)


@pytest.mark.parametrize("case", [*all_cases(), *elementwise_cases()], ids=lambda c: c.name)
def test_every_spelling_keeps_its_outputs(case: Case) -> None:
    """Import, canonical form and channels-last form agree with ONNX Runtime, and hold only the operators expected."""
    imported = import_onnx(case.model)
    canonical = canonicalize()(imported)
    converted = convert_layout()(canonical)
    inputs = random_inputs(case.model)
    expected = onnxruntime_outputs(case.model, inputs)
    for mod in (canonical, converted):
        for found, wanted in zip(run_module(mod, *inputs.values()), expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert operators(converted) == sorted(case.operators.split())


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_chains_of_scales_and_shifts_fold_into_the_convolution(data: st.DataObject) -> None:
    """Whatever mixture of batch norms, scales and shifts follows, one convolution with one bias computes the same."""
    kinds = data.draw(
        st.lists(st.sampled_from(["Add", "Sub", "Mul", "Div", "BatchNormalization"]), min_size=1, max_size=4)
    )
    weights = random_weights(data.draw(st.integers(0, 99)), w=(5, 4, 1, 1))
    nodes = [node("Conv", "x w", "t0")]
    for i, kind in enumerate(kinds):
        if kind == "BatchNormalization":
            new = random_weights(i, **{f"{n}{i}": (5,) for n in ("gamma", "beta", "mean")}, **{f"{i}_variance": (5,)})
            nodes.append(node(kind, f"t{i} gamma{i} beta{i} mean{i} {i}_variance", f"t{i + 1}"))
        else:
            shape = data.draw(st.sampled_from([(5, 1, 1), (1, 5, 1, 1), (1,)]))
            new = random_weights(i, **{f"v{i}_variance": shape})
            left = data.draw(st.booleans()) and kind in ("Add", "Mul")
            nodes.append(node(kind, f"v{i}_variance t{i}" if left else f"t{i} v{i}_variance", f"t{i + 1}"))
        weights |= new
    model = onnx_model(nodes, weights, {"x": (1, 4, 3, 3)}, f"t{len(kinds)}")
    after = canonicalize()(import_onnx(model))
    assert operators(after) in (["add", "conv2d"], ["conv2d"])
    assert set(weights_of(after)) <= {"w", "w.bias"} | {n for n in weights if n.startswith("v")}
    inputs = random_inputs(model)
    expected = onnxruntime_outputs(model, inputs)[0]
    np.testing.assert_allclose(run_module(after, *inputs.values())[0], expected, rtol=1e-3, atol=1e-4)


def test_weights_that_two_layers_share_get_two_names() -> None:
    """Two batch norms fold two different scales into one shared kernel: both results must live on, named apart."""
    weights = random_weights(w=(4, 4, 1, 1), **{f"{n}{i}": (4,) for n in ("g", "b", "m") for i in (1, 2)})
    weights |= random_weights(v1_variance=(4,), v2_variance=(4,))
    nodes = [
        node("Conv", "x w", "c"),
        node("BatchNormalization", "c g1 b1 m1 v1_variance", "n"),
        node("Conv", "n w", "d"),
        node("BatchNormalization", "d g2 b2 m2 v2_variance", "y"),
    ]
    model = onnx_model(nodes, weights)
    after = canonicalize()(import_onnx(model))
    assert list(weights_of(after)) == ["w", "w.bias", "w_1", "w.bias_1"]
    inputs = random_inputs(model)
    np.testing.assert_allclose(
        run_module(after, *inputs.values())[0], onnxruntime_outputs(model, inputs)[0], rtol=1e-4, atol=1e-5
    )


def test_applying_it_twice_changes_nothing() -> None:
    """The canonical form is its own canonical form."""
    once = canonicalize()(import_onnx(zoo_model("cifar10_shufflenetv1")))
    tvm.ir.assert_structural_equal(canonicalize()(once), once)


@pytest.mark.parametrize("name", ["densenet121", "inception_v2", "shufflenet", "resnet50"])
def test_large_graphs_hold_nothing_but_plain_operators(name: str) -> None:
    """Batch norm, dropout, imported loops and computations on weights are gone from networks of many idioms."""
    after = convert_layout()(canonicalize()(import_onnx(light_model_path(name))))
    allowed = "conv2d matmul add nn.relu nn.max_pool2d nn.avg_pool2d mean concat take reshape permute_dims nn.softmax"
    assert set(operators(after)) <= set(allowed.split())


def test_a_batch_norm_without_positive_variance_is_refused() -> None:
    """A broken statistic is named instead of spreading NaN through the network."""
    weights = random_weights(w=(2, 4, 1, 1), gamma=(2,), beta=(2,), mean=(2,))
    weights["variance"] = np.array([1.0, -1.0], np.float32)
    nodes = [node("Conv", "x w", "c"), node("BatchNormalization", "c gamma beta mean variance", "y")]
    with pytest.raises(ModelError, match=r"gamma.*not positive"):
        canonicalize()(import_onnx(onnx_model(nodes, weights)))
