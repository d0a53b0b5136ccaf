"""Protects the differentiated network: which gradients come out, and that backward convolutions are plain convolutions."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from benchmarks.float64_network import Float64Network, cross_entropy
from tests.small_models import run_module, with_weights
from tvm_hquant.errors import ModelError
from tvm_hquant.layers import read_layers
from tvm_hquant.passes.differentiate import differentiate
from tvm_hquant.passes.partition_layers import partition_layers


@I.ir_module
class _Strided:
    @R.function
    def main(
        x: R.Tensor((1, 4, 4, 1), "float32"),
        stem_weight: R.Tensor((2, 1, 1, 1), "float32"),
        head_weight: R.Tensor((8, 3), "float32"),
    ) -> R.Tensor((1, 3), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            stem = R.nn.conv2d(x, stem_weight, strides=[2, 2], data_layout="NHWC", kernel_layout="OIHW")
            active = R.nn.relu(stem)
            flat = R.reshape(active, (1, 8))
            logits = R.matmul(flat, head_weight)
            R.output(logits)
        return logits


def test_strided_convolution_before_and_after() -> None:
    """A stride becomes zeros between the pixels of the gradient, and the backward layer a convolution of stride 1."""
    before = with_weights(_Strided, ["logits"])
    after = differentiate()(partition_layers()(before))
    stem, head = (w.numpy() for w in before["main"].attrs["params"])
    minus_one = tvm.runtime.tensor(np.full((1, 3), -1, np.float32))

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 4, 4, 1), "float32"),
            target: R.Tensor((1, 3), "float32"),
            stem_weight: R.Tensor((2, 1, 1, 1), "float32"),
            head_weight: R.Tensor((8, 3), "float32"),
            head_back: R.Tensor((3, 8), "float32"),
            stem_back: R.Tensor((1, 2, 1, 1), "float32"),
        ) -> R.Tuple(
            R.Tensor((), "float32"),
            R.Tensor((1, 3), "float32"),
            R.Tensor((1, 4, 4, 1), "float32"),
            R.Tensor((1, 2, 2, 2), "float32"),
            R.Tensor((1, 8), "float32"),
            R.Tensor((1, 3), "float32"),
        ):
            with R.dataflow():
                conv = R.nn.conv2d(x, stem_weight, strides=[2, 2], data_layout="NHWC", kernel_layout="OIHW")
                active = R.clip(conv, 0.0, float("inf"))
                flat = R.reshape(active, R.shape([1, 8]))
                logits = R.matmul(flat, head_weight)
                rows = R.reshape(logits, R.shape([1, 3]))
                logarithms = R.nn.log_softmax(rows, axis=-1)
                products = R.multiply(target, logarithms)
                total = R.sum(products)
                loss = R.multiply(total, R.const(-1.0, "float32"))
                negative = R.multiply(R.const(minus_one), target)
                mass = R.sum(negative, axis=[-1], keepdims=True)
                shares = R.exp(logarithms)
                product = R.multiply(mass, shares)
                at_rows = R.subtract(negative, product)
                at_logits = R.reshape(at_rows, R.shape([1, 3]))
                at_flat = R.matmul(at_logits, head_back)
                at_active = R.reshape(at_flat, R.shape([1, 2, 2, 2]))
                passed = R.greater(active, R.const(0.0, "float32"))
                at_conv = R.where(passed, at_active, R.const(0.0, "float32"))
                split = R.reshape(at_conv, R.shape([1, 2, 1, 2, 1, 2]))
                spaced = R.nn.pad(split, [0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0])
                spread = R.reshape(spaced, R.shape([1, 4, 4, 2]))
                at_x = R.nn.conv2d(spread, stem_back, data_layout="NHWC", kernel_layout="OIHW", out_dtype="float32")
                gv = (loss, logarithms, at_x, at_conv, at_flat, at_logits)
                R.output(gv)
            return gv

    main = after["main"]
    tvm.ir.assert_structural_equal(main.without_attr("params").attrs["hquant.inputs"], ["x", "target"])
    assert [str(n) for n in main.attrs["hquant.outputs"]] == [
        "loss", "log_probabilities", "stem.input_gradient", "stem.sum_gradient", "head.input_gradient", "head.sum_gradient",
    ]  # fmt: skip
    assert [p.name for p in list(main.params)[2:]] == [
        "stem.weight", "head.weight", "head.data_gradient.weight", "stem.data_gradient.weight",
    ]  # fmt: skip
    for given, expected in zip(main.attrs["params"], (stem, head, head.T, stem.transpose(1, 0, 2, 3)), strict=True):
        np.testing.assert_array_equal(given.numpy(), expected)
    for attribute in ("params", "num_input", "hquant.inputs", "hquant.outputs"):
        main = main.without_attr(attribute)
    tvm.ir.assert_structural_equal(main, Expected["main"])


def test_differentiated_module_runs_and_agrees_with_central_differences() -> None:
    """Before and after: the loss is the cross entropy, and gradients are what float64 differences give."""
    mod = partition_layers()(with_weights(_Strided, ["logits"], seed=3))
    random = np.random.default_rng(0)
    x = random.normal(size=(1, 4, 4, 1)).astype(np.float32)
    target = np.array([[0, 1, 0]], np.float32)
    loss, logarithms, at_x, *_ = run_module(differentiate()(mod), x, target)
    network = Float64Network(read_layers(mod))
    (logits,) = run_module(mod, x)
    np.testing.assert_allclose(logarithms, logits - np.log(np.exp(logits).sum()), atol=1e-6)
    np.testing.assert_allclose(loss, cross_entropy(network.logits({"x": x}), [1])[0], rtol=1e-5)
    for position in ((0, 0, 0, 0), (0, 2, 2, 0), (0, 1, 1, 0)):
        moved = []
        for step in (1e-5, -1e-5):
            changed = x.astype(np.float64)
            changed[position] += step
            moved.append(cross_entropy(network.logits({"x": changed}), [1])[0])
        np.testing.assert_allclose(at_x[position], (moved[0] - moved[1]) / 2e-5, atol=1e-6)


@I.ir_module
class _Attention:
    @R.function
    def main(
        x: R.Tensor((1, 5, 8), "float32"),
        query_weight: R.Tensor((8, 8), "float32"),
        head_weight: R.Tensor((40, 3), "float32"),
    ) -> R.Tensor((1, 3), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            q = R.matmul(x, query_weight)
            heads = R.reshape(q, (1, 5, 2, 4))
            queries = R.permute_dims(heads, [0, 2, 1, 3])
            x_heads = R.reshape(x, (1, 5, 2, 4))
            keys = R.permute_dims(x_heads, [0, 2, 3, 1])
            products = R.matmul(queries, keys)
            scaled = R.multiply(products, R.const(0.5, "float32"))
            attention = R.nn.softmax(scaled, axis=-1)
            values = R.permute_dims(x_heads, [0, 2, 1, 3])
            mixed = R.matmul(attention, values)
            joined = R.permute_dims(mixed, [0, 2, 1, 3])
            flat = R.reshape(joined, (1, 40))
            logits = R.matmul(flat, head_weight)
            R.output(logits)
        return logits


def _attention_loss(head: np.ndarray, q: np.ndarray, x: np.ndarray) -> float:
    """Cross entropy against class 1, in float64, as a function of what the query layer adds up."""
    queries, keys = (t.reshape(5, 2, 4).transpose(1, 0, 2) for t in (q, x))
    products = queries @ keys.transpose(0, 2, 1) * 0.5
    shares = np.exp(products)
    mixed = (shares / shares.sum(axis=-1, keepdims=True)) @ keys
    logits = mixed.transpose(1, 0, 2).reshape(40) @ head
    return float(np.log(np.exp(logits).sum()) - logits[1])


def test_attention_has_gradients_of_products_of_activations() -> None:
    """Backward products of activations are layers with kernels, and the gradient is that of float64 differences."""
    before = with_weights(_Attention, ["logits"], seed=3)
    mod = partition_layers()(before)
    derived = differentiate()(mod)
    graph = read_layers(partition_layers()(derived))
    kinds = [layer.operator_kind for layer in graph.layers]
    assert kinds.count("batch_matmul") == 4, "two forward, those of the shares and of the queries backward"
    names = [str(n) for n in derived["main"].attrs["hquant.outputs"]]
    x = np.random.default_rng(5).normal(size=(1, 5, 8)).astype(np.float32)
    outputs = dict(zip(names, run_module(derived, x, np.array([[0, 1, 0]], np.float32)), strict=True))
    query, head = (w.numpy().astype(np.float64) for w in before["main"].attrs["params"])
    sums = x[0].astype(np.float64) @ query
    for position in ((0, 0), (2, 3), (4, 7)):
        moved = []
        for step in (1e-5, -1e-5):
            changed = sums.copy()
            changed[position] += step
            moved.append(_attention_loss(head, changed, x[0].astype(np.float64)))
        found = outputs["query.sum_gradient"][(0, *position)]
        np.testing.assert_allclose(found, (moved[0] - moved[1]) / 2e-5, atol=1e-6)


@I.ir_module
class _Normalized:
    @R.function
    def main(
        x: R.Tensor((1, 3, 4, 6), "float32"),
        stem_weight: R.Tensor((6, 6), "float32"),
        head_weight: R.Tensor((72, 3), "float32"),
    ) -> R.Tensor((1, 3), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            stem = R.matmul(x, stem_weight)
            rows = R.nn.layer_norm(
                stem,
                R.const([0.5, 1.0, -0.7, 1.5, 0.3, 2.0], "float32"),
                R.const([0.1, 0.0, 0.2, 0.0, 0.3, 0.0], "float32"),
                axes=[-1],
                epsilon=0.1,
            )
            groups = R.nn.group_norm(
                rows,
                R.const([1.0, 0.5, -0.5, 1.2, 0.8, 1.0], "float32"),
                R.const([0.1, 0.0, 0.2, 0.0, 0.3, 0.0], "float32"),
                num_groups=2,
                channel_axis=3,
                axes=[1, 2],
                epsilon=0.1,
            )
            flat = R.reshape(groups, (1, 72))
            logits = R.matmul(flat, head_weight)
            R.output(logits)
        return logits


def _normalized_loss(head: np.ndarray, sums: np.ndarray) -> float:
    """Cross entropy against class 1, in float64, as a function of what the first layer adds up."""

    def normal(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
        return np.asarray((x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 0.1))

    shift = np.array([0.1, 0.0, 0.2, 0.0, 0.3, 0.0])
    rows = normal(sums, (2,)) * np.array([0.5, 1.0, -0.7, 1.5, 0.3, 2.0]) + shift
    groups = normal(rows.reshape(3, 4, 2, 3), (0, 1, 3)).reshape(3, 4, 6)
    logits = (groups * np.array([1.0, 0.5, -0.5, 1.2, 0.8, 1.0]) + shift).reshape(72) @ head
    return float(np.log(np.exp(logits).sum()) - logits[1])


def test_normalization_has_a_gradient() -> None:
    """Of rows and of groups over positions: that of float64 differences."""
    before = with_weights(_Normalized, ["logits"], seed=3)
    derived = differentiate()(partition_layers()(before))
    names = [str(n) for n in derived["main"].attrs["hquant.outputs"]]
    x = np.random.default_rng(5).normal(size=(1, 3, 4, 6)).astype(np.float32)
    outputs = dict(zip(names, run_module(derived, x, np.array([[0, 1, 0]], np.float32)), strict=True))
    stem, head = (w.numpy().astype(np.float64) for w in before["main"].attrs["params"])
    sums = x[0].astype(np.float64) @ stem
    for position in ((0, 0, 0), (2, 3, 4), (1, 2, 5)):
        moved = []
        for step in (1e-5, -1e-5):
            changed = sums.copy()
            changed[position] += step
            moved.append(_normalized_loss(head, changed))
        found = outputs["stem.sum_gradient"][(0, *position)]
        np.testing.assert_allclose(found, (moved[0] - moved[1]) / 2e-5, rtol=1e-3, atol=1e-6)


def test_operator_without_gradient_is_named() -> None:
    """A user learns which operator stands in the way."""

    @I.ir_module
    class Module:
        @R.function
        def main(x: R.Tensor((1, 4), "float32"), w: R.Tensor((4, 3), "float32")) -> R.Tensor((1, 3), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                product = R.matmul(x, w)
                rounded = R.round(product)
                R.output(rounded)
            return rounded

    with pytest.raises(ModelError, match=r"relax\.round"):
        differentiate()(partition_layers()(with_weights(Module, ["y"])))
