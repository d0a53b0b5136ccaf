"""The frontend: what an imported module looks like, and what is said about models that cannot be imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import pytest
import tvm
from onnx import helper
from tvm import IRModule, relax
from tvm.script import ir as I
from tvm.script import relax as R

from tests.light_models import light_model_path
from tests.onnx_models import node, onnx_model, onnxruntime_outputs, random_inputs, random_weights, zoo_model
from tests.small_models import run_module
from tvm_hquant.errors import ModelError
from tvm_hquant.frontend import TensorSignature, import_onnx, import_relax, input_signature, output_signature
from tvm_hquant.passes.canonicalize import canonicalize
from tvm_hquant.relax_ir.main_function import read_main

WEIGHTS = random_weights(w=(6, 4, 3, 3), b=(6,))
CONV = node("Conv", "x w b", "y")


def weight_names(mod: IRModule) -> list[str]:
    return [str(w.name) for w in read_main(mod).weights]


def test_an_imported_network_has_named_weights_and_computes_the_same() -> None:
    """Inputs first, then the weights under the names of the file, symbolic batch fixed to 1."""
    path = zoo_model("kws_dscnn")
    mod = import_onnx(path)
    model = onnx.load(path)
    assert input_signature(mod) == (TensorSignature("input", (1, 1, 49, 10), "float32"),)
    assert output_signature(mod) == (TensorSignature("logits", (1, 12), "float32"),)
    assert set(weight_names(mod)) == {i.name for i in model.graph.initializer if len(i.dims) and i.data_type == 1}
    inputs = random_inputs(model)
    expected = onnxruntime_outputs(model, inputs)[0]
    np.testing.assert_allclose(run_module(mod, *inputs.values())[0], expected, rtol=1e-3, atol=1e-5)


def test_several_inputs_and_outputs_keep_their_names_and_order() -> None:
    """Names that are no Relax identifiers survive in the signature; outputs come in the order of the file."""
    nodes = [node("Conv", "left/x:0 w", "c"), node("Add", "c right-x", "s"), node("Relu", "s", "r/1")]
    shapes = {"left/x:0": ("N", 4, 5, 5), "right-x": ("N", 6, 3, 3)}
    model = onnx_model(nodes, WEIGHTS, shapes, "s r/1")
    mod = import_onnx(model, batch=2)
    assert [(s.name, s.shape) for s in input_signature(mod)] == [("left/x:0", (2, 4, 5, 5)), ("right-x", (2, 6, 3, 3))]
    assert [(s.name, s.shape) for s in output_signature(mod)] == [("s", (2, 6, 3, 3)), ("r/1", (2, 6, 3, 3))]
    inputs = random_inputs(model, batch=2)
    for found, wanted in zip(run_module(mod, *inputs.values()), onnxruntime_outputs(model, inputs), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_legacy_model_has_one_input_and_placeholder_weights_with_names() -> None:
    """IR version 3 lists initializers among the inputs; weights made by ConstantOfShape keep the name of their tensor."""
    mod = import_onnx(light_model_path("squeezenet"))
    assert [s.name for s in input_signature(mod)] == ["data_0"]
    assert "fire2/squeeze1x1_w_0" in weight_names(mod)


def test_weights_in_constant_nodes_keep_their_names() -> None:
    """Exporters that write weights as Constant nodes get named layers, too."""
    constant = helper.make_node("Constant", [], ["kernel"], value=onnx.numpy_helper.from_array(WEIGHTS["w"]))
    mod = import_onnx(onnx_model([constant, node("Conv", "x kernel", "y")]))
    assert weight_names(mod) == ["kernel"]


def test_a_given_proto_is_not_changed() -> None:
    """The caller's model is only read."""
    model = onnx_model([CONV], WEIGHTS, {"x": ("N", 4, 8, 8)})
    before = model.SerializeToString()
    import_onnx(model)
    assert model.SerializeToString() == before


def test_weights_in_another_file_are_loaded(tmp_path: Path) -> None:
    """External data are found beside the model."""
    onnx.save(
        onnx_model([CONV], WEIGHTS), tmp_path / "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0
    )
    mod = import_onnx(tmp_path / "m.onnx")
    values = {w.name: v for w, v in read_main(mod).weights.items()}
    np.testing.assert_array_equal(values["w"], WEIGHTS["w"])


@pytest.mark.parametrize(
    ("declared", "options", "expected"),
    [
        ((1, 4, 8, 8), {}, (1, 4, 8, 8)),
        (("N", 4, 8, 8), {"batch": 3}, (3, 4, 8, 8)),
        (("N", 4, "H", "H"), {"input_shapes": {"x": (2, 4, 5, 5)}}, (2, 4, 5, 5)),
        ((0, 4, 8, 8), {}, (1, 4, 8, 8)),
        ((5, 4, 8, 8), {}, (5, 4, 8, 8)),
    ],
)
def test_open_dimensions_are_fixed(declared: Any, options: dict[str, Any], expected: tuple[int, ...]) -> None:
    """The batch is 1 unless asked otherwise, other open dimensions come from input_shapes, fixed ones stay."""
    mod = import_onnx(onnx_model([CONV], WEIGHTS, {"x": declared}), **options)
    assert input_signature(mod)[0].shape == expected


def test_one_name_of_a_dimension_means_one_size() -> None:
    """What input_shapes says of one input fixes dimensions of the same name elsewhere."""
    model = onnx_model([node("Add", "a b", "y")], {}, {"a": ("N", "T"), "b": ("N", "T")})
    mod = import_onnx(model, input_shapes={"a": (2, 7)})
    assert [s.shape for s in input_signature(mod)] == [(2, 7), (2, 7)]


@pytest.mark.parametrize(
    ("declared", "options", "message"),
    [
        (("N", 4, "H", 8), {}, r'dimension 2 \("H"\) of input x.*--input-shapes "x:\[N,4,H,8\]".*input_shapes'),
        ((1, 4, 8, 8), {"input_shapes": {"z": (1,)}}, r"names z, but .* has the inputs x"),
        ((1, 4, 8, 8), {"input_shapes": {"x": (1, 4, 8)}}, r"3 dimensions \(1×4×8\).*it has 4"),
        ((1, 4, 8, 8), {"input_shapes": {"x": (1, 4, 8, 9)}}, r"dimension 3 of input x the size 9.*fixes it to 8"),
        (("N", 4, 8, 8), {"input_shapes": {"x": (-1, 4, 8, 8)}}, r"must be positive"),
        (("N", 4, "H", "H"), {"input_shapes": {"x": (1, 4, 8, 9)}}, r"dimension H of .* two sizes, 8 and 9"),
        ((1, 4, 8, 8), {"batch": 2}, r"batch is 2, but .* to 1: export"),
        (("N", 4, 8, 8), {"batch": 0}, r"batch is 0"),
    ],
)
def test_wrong_shapes_are_explained(declared: Any, options: dict[str, Any], message: str) -> None:
    """Each message names the input, the dimension and the option."""
    with pytest.raises(ModelError, match=message):
        import_onnx(onnx_model([CONV], WEIGHTS, {"x": declared}), **options)


def test_what_follows_from_shapes_and_numbers_is_constant() -> None:
    """Exporters compute widths of paddings and write masks with ScatterND: TVM's importer gets their values, of any size."""
    numbers = {"size": np.int64([6, 64, 64]), "rows": np.int64([[3], [5]]), "twice": np.int64([2, 2])}
    ones = helper.make_node("ConstantOfShape", ["size"], ["zeros"])
    nodes = [
        *(node("Shape", "x", "s"), node("Mul", "s one", "t"), node("Concat", "t t", "wide", axis=0)),
        *(node("Sub", "wide wide", "none"), node("Pad", "x none", "p")),
        *(ones, node("Gather", "zeros twice", "z"), node("Cos", "z", "c"), node("ScatterND", "zeros rows c", "mask")),
        node("Add", "p mask", "y"),
    ]
    model = onnx_model(nodes, {**numbers, "one": np.int64(1)}, {"x": ("N", 6, 64, 64)})
    mod = import_onnx(model)
    inputs = random_inputs(model)
    np.testing.assert_array_equal(run_module(mod, *inputs.values())[0], onnxruntime_outputs(model, inputs)[0])
    main = read_main(canonicalize()(mod))
    assert [str(value.op.name) for _, value in main.bindings] == ["relax.add"]
    assert [str(w.name) for w in main.weights] == ["mask"]


def _no_outputs() -> Any:
    model = onnx_model([CONV], WEIGHTS)
    del model.graph.output[:]
    return model


def _loop() -> Any:
    body = helper.make_graph([], "body", [], [])
    return onnx_model([helper.make_node("Loop", ["n", "c"], ["y"], name="again", body=body)])


def _own_domain() -> Any:
    return onnx_model([helper.make_node("Conv", ["x"], ["y"], name="special", domain="my.company")])


def _nan_weight() -> Any:
    return onnx_model([CONV], {"w": np.full((6, 4, 3, 3), np.nan, np.float32), "b": WEIGHTS["b"]})


def _wrong_order() -> Any:
    return onnx_model([node("Relu", "c", "y"), node("Conv", "x w", "c")], WEIGHTS)


def _external_without_path() -> Any:
    model = onnx_model([CONV], WEIGHTS)
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "gone.bin")
    return model


def _quantized() -> Any:
    scales = {"s": np.float32(0.1), "z": np.uint8(3)}
    return onnx_model([node("QuantizeLinear", "x s z", "q"), node("DequantizeLinear", "q s z", "y")], scales)


def _run_time_shape() -> Any:
    return onnx_model([node("NonZero", "x", "y")])


def _boxes() -> Any:
    inputs = {"boxes": (1, 9, 4), "scores": (1, 1, 9)}
    return onnx_model([node("NonMaxSuppression", "boxes scores most", "y")], {"most": np.int64([3])}, inputs)


def _recurrent() -> Any:
    weights = random_weights(w=(1, 8, 4), r=(1, 8, 2))
    return onnx_model([node("LSTM", "x w r", "y", hidden_size=2)], weights, {"x": (5, 1, 4)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_outputs, "has no outputs"),
        (_loop, r"operator Loop \(node again\) is control flow"),
        (_own_domain, r"operator Conv \(node special\) is of the domain my.company"),
        (
            lambda: onnx_model([node("Bernoulli", "x", "y")], opset=15),
            r"operator Bernoulli \(node node_y, domain ai.onnx\)",
        ),
        (lambda: onnx_model([CONV], WEIGHTS, opset=8), "opset 8; 9 and later"),
        (
            lambda: onnx_model([CONV], WEIGHTS, dtype=onnx.TensorProto.DOUBLE),
            "input x has dtype double; allowed are float",
        ),
        (lambda: onnx_model([node("Relu", "x", "y")], dtype=onnx.TensorProto.FLOAT16), "input x has dtype float16"),
        (_nan_weight, "weight w holds NaN"),
        (_wrong_order, "no valid ONNX model"),
        (_external_without_path, "keeps weights such as w in another file"),
        (_quantized, "operator QuantizeLinear .* quantized already"),
        (lambda: onnx_model([CONV], random_weights(w=(6, 5, 3, 3), b=(6,))), r"operator Conv .*node_y"),
        (_run_time_shape, r"operator NonZero \(node node_y\).*known only at run time"),
        (_boxes, r"NonMaxSuppression \(node node_y\).*end the model before it, with the outputs boxes, scores \("),
        (_recurrent, r"operator LSTM \(node node_y\) is recurrent"),
    ],
)
def test_models_that_cannot_be_imported(make: Callable[[], Any], message: str) -> None:
    """Each refusal is a ModelError that says what stands in the way, and where."""
    with pytest.raises(ModelError, match=message):
        import_onnx(make())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "no ONNX model"),
        (b"not a model at all, but some text", "no ONNX model"),
        (b"half", "no ONNX model, or is cut short"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    """Missing, empty, foreign and truncated files are told apart from models, by their path."""
    path = tmp_path / "broken.onnx"
    if content == b"half":
        whole = onnx_model([CONV], WEIGHTS).SerializeToString()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        import_onnx(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [None, 100])
def test_damaged_external_data(tmp_path: Path, cut: int | None) -> None:
    """A missing or short weight file is named."""
    path = tmp_path / "m.onnx"
    onnx.save(onnx_model([CONV], WEIGHTS), path, save_as_external_data=True, location="m.bin", size_threshold=0)
    data = tmp_path / "m.bin"
    content = data.read_bytes()
    data.unlink()
    if cut is not None:
        data.write_bytes(content[:cut])
    with pytest.raises(ModelError, match=r"m\.bin|external file"):
        import_onnx(path)


@I.ir_module
class WithConstants:
    @R.function(private=True)
    def block(x: R.Tensor((1, 4), "float32")) -> R.Tensor((1, 4), "float32"):
        with R.dataflow():
            y = R.nn.relu(x)
            R.output(y)
        return y

    @R.function
    def main(x: R.Tensor((1, 4), "float32")) -> R.Tensor((1, 3), "float32"):
        cls = WithConstants
        with R.dataflow():
            a = cls.block(x)
            b = R.matmul(a, R.const([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [1, 0, 1]], "float32"))
            c = R.add(b, R.const([1.0, 2, 3], "float32"))
            R.output(c)
        return c


@I.ir_module
class Unbound:
    @R.function
    def main(x: R.Tensor((1, 4), "float32"), w: R.Tensor((4, 3), "float32")) -> R.Tensor((1, 3), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            b = R.matmul(x, w)
            R.output(b)
        return b


def test_a_relax_module_gets_named_weights_and_names_of_its_ends() -> None:
    """Constants become weights, private functions are inlined, the caller's module stays as it was."""
    copy = WithConstants.clone()
    mod = import_relax(WithConstants)
    tvm.ir.assert_structural_equal(WithConstants, copy)
    assert weight_names(mod) == ["dense_0.weight", "add_0.constant"]
    assert [s.name for s in (*input_signature(mod), *output_signature(mod))] == ["x", "output"]
    x = np.array([[1.0, -1, 2, 0]], np.float32)
    np.testing.assert_array_equal(run_module(mod, x)[0], [[16.0, 20.0, 24.0]])
    tvm.ir.assert_structural_equal(import_relax(mod), mod)


def test_relax_modules_that_cannot_be_imported() -> None:
    """No main, weights without values, open shapes, something else altogether."""
    with pytest.raises(ModelError, match='no Relax function "main"'):
        import_relax(IRModule({}))
    with pytest.raises(ModelError, match="1 parameters behind its 1 inputs but 0 values"):
        import_relax(Unbound)
    with pytest.raises(ModelError, match="takes a Relax IRModule, not a str"):
        import_relax("model.onnx")  # type: ignore[arg-type]
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((tvm.tirx.Var("n", "int64"), 4), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    with pytest.raises(ModelError, match="input x is not one tensor of fixed shape"):
        import_relax(builder.finalize())


def test_anything_else_is_no_model() -> None:
    """A wrong argument is a ModelError, not a TypeError from far below."""
    with pytest.raises(ModelError, match=r"a model is a path, an onnx\.ModelProto or a Relax IRModule, not a int"):
        import_onnx(3)
