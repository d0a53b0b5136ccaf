"""Conversions are explicit and few: protects where they stand, what they compute, and that one serves all readers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import tvm
from tvm import IRModule
from tvm.script import ir as I
from tvm.script import relax as R

from tests.planned_models import through_text
from tests.small_models import run_module, with_weights
from tvm_hquant.errors import PrecisionError
from tvm_hquant.layers import PRECISION_ATTRIBUTE, read_layers
from tvm_hquant.operator_codec import encode
from tvm_hquant.operators import Convert, MaxPool2D, Window
from tvm_hquant.passes.insert_casts import insert_casts
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.passes.realize_quantization import realize_quantization
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat

BYTE = TensorFormat("uint8", 0.5, 3, 0, 255)
WIDE = TensorFormat("uint16", 0.125, 100, 0, 65535)
SIGNED = TensorFormat("int8", 0.25, 0, -128, 127)
ALL_CODES = {"uint8": BYTE, "uint16": WIDE, "int8": SIGNED}


def annotated(mod: IRModule, precisions: Mapping[str, str]) -> IRModule:
    """The module with a precision on every layer."""
    result = mod.clone()
    for layer in read_layers(mod).layers:
        function = mod[layer.function_name]
        result[layer.function_name] = function.with_attr(PRECISION_ATTRIBUTE, precisions[layer.name])
    return result


def fork() -> IRModule:
    """``first = x + x``, read by ``left`` and ``right``, which ``last`` adds."""

    @I.ir_module
    class Fork:
        @R.function
        def main(x: R.Tensor((1, 6), "float32")) -> R.Tensor((1, 6), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                first = R.add(x, x)
                left = R.add(first, first)
                right = R.add(first, first)
                last = R.add(left, right)
                R.output(last)
            return last

    return partition_layers()(with_weights(Fork, ["y"]))


def casts(mod: IRModule) -> list[str]:
    """Kind and tensor of every conversion in execution order."""
    graph = read_layers(mod)
    found = []
    for layer in graph.layers:
        if isinstance(layer.operator, Convert):
            kind = mod[layer.function_name].attrs[PRECISION_ATTRIBUTE]
            found.append(f"{kind} {layer.inputs[0]} for {', '.join(name for name, _ in graph.consumers[layer.name])}")
    return found


def fork_casts(first: str, left: str, right: str, last: str) -> list[str]:
    """The conversions of :func:`fork` under four precisions."""
    mod = fork()
    names = [layer.name for layer in read_layers(mod).layers]
    scales = dict.fromkeys(("x", *names), ALL_CODES)
    return casts(insert_casts(scales)(annotated(mod, dict(zip(names, (first, left, right, last), strict=True)))))


def test_quantize_and_dequantize_around_a_pool() -> None:
    """The whole text of a small module: what a layer in uint8 and its two conversions look like."""

    @I.ir_module
    class Model:
        @R.function
        def main(x: R.Tensor((1, 4, 4, 2), "float32")) -> R.Tensor((1, 2, 2, 2), "float32"):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                y = R.nn.max_pool2d(x, (2, 2), (2, 2), layout="NHWC")
                R.output(y)
            return y

    pool = encode(MaxPool2D((1, 4, 4, 2), Window((2, 2), (2, 2))))
    pool_formats = encode(((BYTE,), BYTE))
    whole, pooled = encode(Convert((1, 4, 4, 2))), encode(Convert((1, 2, 2, 2)))
    quantize_formats, dequantize_formats = encode(((FLOAT32_FORMAT,), BYTE)), encode(((BYTE,), FLOAT32_FORMAT))

    @I.ir_module
    class Expected:
        @R.function(private=True)
        def x_to_uint8_3_0_5(x: R.Tensor((1, 4, 4, 2), "float32")) -> R.Tensor((1, 4, 4, 2), "uint8"):
            R.func_attr(
                {
                    "hquant.formats": quantize_formats,
                    "hquant.layer": "x.to_uint8_3_0.5",
                    "hquant.operator": whole,
                    "hquant.precision": "quantize",
                }
            )
            with R.dataflow():
                scaled = R.divide(x, R.const(0.5, "float32"))
                rounded = R.round(scaled)
                clipped = R.clip(rounded, -3, 252)
                shifted = R.add(clipped, R.const(3.0, "float32"))
                stored = R.astype(shifted, "uint8")
                gv: R.Tensor((1, 4, 4, 2), "uint8") = stored
                R.output(gv)
            return gv

        @R.function(private=True)
        def max_pool2d_0(input_0: R.Tensor((1, 4, 4, 2), "uint8")) -> R.Tensor((1, 2, 2, 2), "uint8"):
            R.func_attr(
                {
                    "hquant.formats": pool_formats,
                    "hquant.layer": "max_pool2d_0",
                    "hquant.operator": pool,
                    "hquant.precision": "a8w8",
                }
            )
            with R.dataflow():
                codes = R.astype(input_0, "float32")
                centred = R.subtract(codes, R.const(3.0, "float32"))
                real = R.multiply(centred, R.const(0.5, "float32"))
                largest = R.nn.max_pool2d(real, (2, 2), (2, 2), layout="NHWC")
                body: R.Tensor((1, 2, 2, 2), "float32") = largest
                scaled = R.divide(body, R.const(0.5, "float32"))
                rounded = R.round(scaled)
                clipped = R.clip(rounded, -3, 252)
                shifted = R.add(clipped, R.const(3.0, "float32"))
                stored = R.astype(shifted, "uint8")
                gv: R.Tensor((1, 2, 2, 2), "uint8") = stored
                R.output(gv)
            return gv

        @R.function(private=True)
        def max_pool2d_0_to_float32(x: R.Tensor((1, 2, 2, 2), "uint8")) -> R.Tensor((1, 2, 2, 2), "float32"):
            R.func_attr(
                {
                    "hquant.formats": dequantize_formats,
                    "hquant.layer": "max_pool2d_0.to_float32",
                    "hquant.operator": pooled,
                    "hquant.precision": "dequantize",
                }
            )
            with R.dataflow():
                codes = R.astype(x, "float32")
                centred = R.subtract(codes, R.const(3.0, "float32"))
                real = R.multiply(centred, R.const(0.5, "float32"))
                gv: R.Tensor((1, 2, 2, 2), "float32") = real
                R.output(gv)
            return gv

        @R.function
        def main(x: R.Tensor((1, 4, 4, 2), "float32")) -> R.Tensor((1, 2, 2, 2), "float32"):
            R.func_attr({"hquant.inputs": ["x"], "hquant.outputs": ["y"]})
            cls = Expected
            with R.dataflow():
                a: R.Tensor((1, 4, 4, 2), "uint8") = cls.x_to_uint8_3_0_5(x)
                b: R.Tensor((1, 2, 2, 2), "uint8") = cls.max_pool2d_0(a)
                c: R.Tensor((1, 2, 2, 2), "float32") = cls.max_pool2d_0_to_float32(b)
                gv: R.Tensor((1, 2, 2, 2), "float32") = c
                R.output(gv)
            return gv

    before = annotated(partition_layers()(with_weights(Model, ["y"])), {"max_pool2d_0": "a8w8"})
    scales = {"x": {"uint8": BYTE}, "max_pool2d_0": {"uint8": BYTE}}
    after = insert_casts(scales)(before)
    tvm.ir.assert_structural_equal(after, Expected)
    tvm.ir.assert_structural_equal(through_text(after), Expected)
    # The module still runs as it stands; the largest of codes is the code of the largest.
    x = np.arange(32, dtype="float32").reshape(1, 4, 4, 2) - 4
    expected = np.maximum(x[:, 1::2, 1::2], -1.5)
    np.testing.assert_array_equal(run_module(after, x)[0], expected)


@pytest.mark.parametrize(
    ("precision", "kind"), [("a8w8", "quantize"), ("int8", "quantize"), ("a16w8", "quantize"), ("float16", "cast")]
)
def test_nothing_between_layers_of_one_precision(precision: str, kind: str) -> None:
    """A region of one precision has a conversion where the graph's input enters it, and no other."""
    assert fork_casts(precision, precision, precision, precision) == [f"{kind} x for add_0, add_0"]


def test_float32_everywhere_needs_no_conversion() -> None:
    """A plan that quantizes nothing leaves the graph as it was, up to the formats that functions carry."""
    assert fork_casts("float32", "float32", "float32", "float32") == []


def test_one_quantize_serves_all_readers() -> None:
    """A float tensor that two integer layers read is quantized once."""
    assert fork_casts("float32", "a8w8", "a8w8", "a8w8") == ["quantize add_0 for add_1, add_1, add_2, add_2"]


def test_integer_layer_writes_float_for_a_float_reader() -> None:
    """uint8 to float32: no dequantize, the layer's own epilogue gives float32."""
    assert fork_casts("a8w8", "float32", "float32", "float32") == ["quantize x for add_0, add_0"]


def test_wide_codes_are_requantized_for_the_narrow_reader() -> None:
    """A tensor is made in the widest codes that are read; the others get one requantize, never a way through floats."""
    assert fork_casts("a16w8", "a16w8", "a8w8", "a8w8") == [
        "quantize x for add_0, add_0",
        "requantize add_0 for add_2, add_2",
    ]


def test_signed_and_unsigned_readers_share_by_requantizing() -> None:
    """int8 and uint8 codes have scales of their own."""
    found = fork_casts("a8w8", "int8", "a8w8", "a8w8")
    assert found[0] == "quantize x for add_0, add_0"
    assert [c.split()[0] for c in found[1:]] == ["requantize"]


def test_graph_output_is_float32() -> None:
    """Callers get real numbers whatever the last layer computes in."""
    mod = fork()
    names = [layer.name for layer in read_layers(mod).layers]
    scales = dict.fromkeys(("x", *names), ALL_CODES)
    for precision in ("a8w8", "int8", "a16w8", "bfloat16"):
        after = insert_casts(scales)(annotated(mod, dict.fromkeys(names, precision)))
        assert str(after["main"].ret_ty.dtype) == "float32"


def test_missing_scale_is_named() -> None:
    """Which layer cannot read which tensor, and in which codes."""
    mod = annotated(fork(), dict.fromkeys(("add_0", "add_1", "add_2", "add_3"), "a8w8"))
    with pytest.raises(PrecisionError, match=r"layer add_0 in a8w8 reads x, whose uint8 scale is not known"):
        insert_casts({name: {"uint8": BYTE} for name in ("add_0", "add_1", "add_2")})(mod)


@pytest.mark.parametrize("precisions", ["a8w8 a8w8 a8w8 a8w8", "a16w8 a16w8 a8w8 int8", "float32 a8w8 int8 bfloat16"])
def test_module_with_casts_says_in_real_numbers_what_kernels_compute(precisions: str) -> None:
    """Stage 5 is not only typed but means the same as stage 6: with scales that are powers of two, exactly the same."""
    mod = fork()
    names = [layer.name for layer in read_layers(mod).layers]
    scales = dict.fromkeys(("x", *names), ALL_CODES)
    cast = insert_casts(scales)(annotated(mod, dict(zip(names, precisions.split(), strict=True))))
    realized = realize_quantization(PrecisionPlan("", "", {}, scales))(cast)
    x = np.random.default_rng(3).normal(0, 9, (1, 6)).astype("float32")
    np.testing.assert_array_equal(run_module(cast, x)[0], run_module(realized, x)[0])
