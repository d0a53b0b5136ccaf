"""Which format each tensor is made and read in: protects that casts are few, exact where they can be, and explained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.errors import PrecisionError
from tvm_hquant.formats import Conversion, assign_formats, codes_name, follow_consumers, is_transparent
from tvm_hquant.layers import GraphTensor, Layer, LayerGraph
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    Concat,
    Conv2D,
    GroupNormalization,
    MaxPool2D,
    Movement,
    Operator,
    Softmax,
    Unary,
    Window,
)
from tvm_hquant.precision import A8W8, A16W8, BFLOAT16, FLOAT16, FLOAT32, INT8, Precision, parse_precision
from tvm_hquant.tensor_format import FLOAT32_FORMAT, TensorFormat

SHAPE = (1, 4, 4, 2)
CONVOLUTION = Conv2D(SHAPE, 2, Window((1, 1)))
POOL = MaxPool2D(SHAPE, Window((2, 2), (2, 2)))
BYTE = TensorFormat("uint8", 0.5, 3, 0, 255)
OTHER_BYTE = TensorFormat("uint8", 0.25, 3, 0, 255)
SIGNED = TensorFormat("int8", 0.5, 0, -128, 127)
WIDE = TensorFormat("uint16", 0.125, 9, 0, 65535)
Node = tuple[str, Operator, tuple[str, ...]]
"""Name, operator and inputs of a layer."""
ALL = {"uint8": BYTE, "int8": SIGNED, "uint16": WIDE}


def graph_of(layers: Iterable[Node], *outputs: str) -> LayerGraph:
    """A graph without weights over one input ``x``."""
    made = tuple(Layer(name, name, operator, inputs) for name, operator, inputs in layers)
    return LayerGraph({"x": GraphTensor(SHAPE)}, made, outputs, outputs)


def all_scales(graph: LayerGraph) -> dict[str, dict[str, TensorFormat]]:
    """The same formats for all tensors."""
    return {name: dict(ALL) for name in (*graph.inputs, *graph.by_name)}


def named(precisions: Mapping[str, str]) -> dict[str, Precision]:
    """Precisions by their names."""
    return {layer: parse_precision(p) for layer, p in precisions.items()}


# follow_consumers: precisions of layers without weights.


def test_layer_without_weights_takes_the_widest_precision_of_its_readers() -> None:
    """A tensor that a float and an 8-bit layer read is not squeezed into 8 bits on its way."""
    graph = graph_of([("pool", POOL, ("x",)), ("a", CONVOLUTION, ("pool",)), ("b", CONVOLUTION, ("pool",))], "a", "b")
    for narrow, wide in (("a8w8", "a16w8"), ("a16w8", "bfloat16"), ("a8w8", "float32"), ("float16", "float32")):
        followed = follow_consumers(graph, named({"a": narrow, "b": wide}), {})
        assert followed["pool"].precision == parse_precision(wide)
        assert followed["pool"].reason == ("as its readers" if wide == "a16w8" else "cast cost")


def test_narrow_weights_of_a_reader_do_not_matter() -> None:
    """a8w4 says how wide weights are; a pool before it moves plain uint8."""
    graph = graph_of([("pool", POOL, ("x",)), ("a", CONVOLUTION, ("pool",))], "a")
    assert follow_consumers(graph, named({"a": "a8w4"}), {})["pool"].precision == A8W8
    assert follow_consumers(graph, named({"a": "a16w16"}), {})["pool"].precision == A16W8
    assert follow_consumers(graph, named({"a": "w4"}), {})["pool"].precision == FLOAT32
    assert follow_consumers(graph, named({"a": "int8"}), {})["pool"].precision == INT8


def test_chains_follow_through() -> None:
    """The precision of a reader reaches back through any number of layers without weights."""
    reshape = Movement("reshape", (1, 2, 2, 2), (1, 8))
    add = Add((1, 8))
    layers: list[Node] = [
        ("pool", POOL, ("x",)), ("flat", reshape, ("pool",)), ("sum", add, ("flat", "flat")), ("a", CONVOLUTION, ("sum",)),
    ]  # fmt: skip
    followed = follow_consumers(graph_of(layers, "a"), {"a": A16W8}, {})
    assert {f.precision for f in followed.values()} == {A16W8}


def test_graph_output_is_computed_in_the_precision_of_outputs() -> None:
    """The last layers keep float32 unless the target has no floats."""
    graph = graph_of([("a", CONVOLUTION, ("x",)), ("pool", POOL, ("a",))], "pool")
    assert follow_consumers(graph, {"a": A8W8}, {})["pool"].precision == FLOAT32
    assert follow_consumers(graph, {"a": A8W8}, {}, A16W8)["pool"].precision == A16W8
    assert follow_consumers(graph, {"a": A8W8}, {})["pool"].detail == "makes a graph output"


def test_output_that_is_read_as_codes_too_is_dequantized_once() -> None:
    """Layers make the parts of a joined output as codes; in float32 they would be quantized for each of their readers."""
    joined = Conv2D((1, 4, 4, 4), 2, Window((1, 1)))
    layers: list[Node] = [
        ("a", CONVOLUTION, ("x",)), ("b", CONVOLUTION, ("a",)), ("join", Concat((SHAPE, SHAPE), 3), ("a", "b")),
        ("c", joined, ("join",)), ("order", Movement("permute_dims", (1, 4, 4, 4), (1, 4, 4, 4), (0, 3, 1, 2)), ("join",)),
    ]  # fmt: skip
    graph = graph_of(layers, "join", "order", "c")
    anchors = dict.fromkeys("abc", A8W8)
    followed = follow_consumers(graph, anchors, {})
    assert (followed["join"].precision, followed["join"].reason) == (A8W8, "as its readers")
    precisions = {**anchors, **{name: f.precision for name, f in followed.items()}}
    formats = assign_formats(graph, precisions, all_scales(graph))
    assert [(c.tensor, c.kind) for c in formats.conversions(graph)] == [("x", "quantize"), ("join", "dequantize")]
    for others in ({"a": FLOAT32}, {"c": FLOAT32}):  # a float maker; a float reader: then nothing is gained
        assert follow_consumers(graph, {**anchors, **others}, {})["join"].precision == FLOAT32


def test_operators_without_integer_kernels_stay_in_float32() -> None:
    """And the reason says so: softmax has no kernel in codes, sigmoid has none for 16-bit codes."""
    softmax = graph_of([("s", Softmax(SHAPE, 3), ("x",)), ("a", CONVOLUTION, ("s",))], "a")
    followed = follow_consumers(softmax, {"a": A8W8}, {})["s"]
    assert (followed.precision, followed.reason) == (FLOAT32, "no kernel")
    assert followed.detail == "softmax has no kernel for a8w8 activations"
    for function, reader, expected in (
        ("sigmoid", A8W8, A8W8), ("sigmoid", A16W8, FLOAT32), ("sigmoid", BFLOAT16, FLOAT32), ("clip", A16W8, A16W8),
    ):  # fmt: skip
        graph = graph_of([("u", Unary(SHAPE, function, (0.0, 6.0)), ("x",)), ("a", CONVOLUTION, ("u",))], "a")
        assert follow_consumers(graph, {"a": reader}, {})["u"].precision == expected


def test_float_operators_write_the_codes_that_all_readers_want() -> None:
    """A softmax or normalization ends in codes, with a reader in float or in other codes in floats; a sigmoid in floats."""
    for operator in (Softmax(SHAPE, 3), GroupNormalization(SHAPE, 3, 3, 1e-5)):
        layers: list[Node] = [("s", operator, ("x",)), ("a", CONVOLUTION, ("s",)), ("b", CONVOLUTION, ("s",))]
        graph = graph_of(layers, "a", "b")
        for readers, made in (
            ((A8W8, A8W8), "uint8"), ((A16W8, A16W8), "uint16"), ((A8W8, FLOAT32), "float32"),
            ((A8W8, A16W8), "float32"), ((BFLOAT16, BFLOAT16), "bfloat16"),
        ):  # fmt: skip
            precisions = {"s": FLOAT32, "a": readers[0], "b": readers[1]}
            formats = assign_formats(graph, precisions, all_scales(graph))
            assert formats.produced["s"].dtype == made
        left = graph_of(layers, "s", "a", "b")
        assert (
            assign_formats(left, {"s": FLOAT32, "a": A8W8, "b": A8W8}, all_scales(left)).produced["s"].dtype
            == "float32"
        )


def test_pool_behind_a_float_layer_is_converted_after_it() -> None:
    """A quarter of the elements to quantize: the conversion stands where the tensor is smallest."""
    pool = AveragePool2D(SHAPE, Window((2, 2), (2, 2)))
    layers: list[Node] = [("a", CONVOLUTION, ("x",)), ("pool", pool, ("a",)), ("b", CONVOLUTION, ("pool",))]
    followed = follow_consumers(graph_of(layers, "b"), {"a": FLOAT32, "b": A8W8}, {})
    assert followed["pool"].precision == FLOAT32
    assert "smaller behind this one" in followed["pool"].detail
    assert follow_consumers(graph_of(layers, "b"), {"a": A8W8, "b": A8W8}, {})["pool"].precision == A8W8


def test_what_the_user_fixed_wins() -> None:
    """A fixed precision is taken over from the user, and passed on to producers."""
    graph = graph_of([("sum", Add(SHAPE), ("x", "x")), ("pool", POOL, ("sum",)), ("a", CONVOLUTION, ("pool",))], "a")
    followed = follow_consumers(graph, {"a": A8W8}, {"pool": A16W8})
    assert followed["pool"].reason == "chosen by the user"
    assert followed["sum"].precision == A16W8


# assign_formats: formats of tensors.


def test_integer_layer_writes_the_codes_that_its_reader_takes() -> None:
    """Two layers of one precision meet without any conversion."""
    graph = graph_of([("a", CONVOLUTION, ("x",)), ("b", CONVOLUTION, ("a",))], "b")
    formats = assign_formats(graph, {"a": A8W8, "b": A8W8}, all_scales(graph))
    assert formats.produced == {"x": FLOAT32_FORMAT, "a": BYTE, "b": FLOAT32_FORMAT}
    assert formats.conversions(graph) == (Conversion("x", FLOAT32_FORMAT, BYTE),)


@pytest.mark.parametrize(
    ("readers", "written", "kinds"),
    [
        (("a8w8", "a16w8"), WIDE, ["requantize"]),
        (("a8w8", "float32"), FLOAT32_FORMAT, ["quantize"]),
        (("a8w8", "bfloat16"), FLOAT32_FORMAT, ["quantize", "cast"]),
        (("a16w8", "a16w8"), WIDE, []),
    ],
)
def test_widest_reader_wins(readers: tuple[str, str], written: TensorFormat, kinds: list[str]) -> None:
    """The tensor is written as its widest reader takes it; every other kind of reader costs one conversion."""
    graph = graph_of([("a", CONVOLUTION, ("x",)), ("b", CONVOLUTION, ("a",)), ("c", CONVOLUTION, ("a",))], "b", "c")
    precisions = {"a": A8W8, "b": parse_precision(readers[0]), "c": parse_precision(readers[1])}
    formats = assign_formats(graph, precisions, all_scales(graph))
    assert formats.produced["a"] == written
    assert [c.kind for c in formats.conversions(graph) if c.tensor == "a"] == kinds


def test_among_equal_widths_the_own_scale_comes_first() -> None:
    """A tensor read with its own scale and with that of a concatenation is written with its own: it fits its range."""
    wide_concat = Concat((SHAPE, SHAPE), 3)
    graph = graph_of(
        [("a", CONVOLUTION, ("x",)), ("joined", wide_concat, ("a", "a")), ("b", CONVOLUTION, ("a",))], "joined", "b"
    )
    scales = all_scales(graph)
    scales["joined"] = {"uint8": OTHER_BYTE}
    formats = assign_formats(graph, {"a": A8W8, "joined": A8W8, "b": A8W8}, scales)
    assert formats.produced["a"] == BYTE
    assert formats.required["joined", 0] == OTHER_BYTE
    assert [(c.tensor, c.kind) for c in formats.conversions(graph)] == [
        ("x", "quantize"), ("a", "requantize"), ("joined", "dequantize"),
    ]  # fmt: skip


@given(st.sampled_from(["a8w8", "int8", "a16w8", "float16", "bfloat16", "float32"]))
@settings(max_examples=6, deadline=None)
def test_transparent_layers_pass_formats_through(name: str) -> None:
    """What a pool, a reshape or a concatenation reads and writes is stored in one way: no value changes inside them."""
    precision = parse_precision(name)
    reshape = Movement("reshape", (1, 2, 2, 2), (1, 8))
    graph = graph_of(
        [("pool", POOL, ("x",)), ("flat", reshape, ("pool",)), ("joined", Concat(((1, 8),) * 2, 1), ("flat", "flat"))],
        "joined",
    )
    formats = assign_formats(graph, dict.fromkeys(graph.by_name, precision), all_scales(graph))
    for layer in graph.layers:
        assert is_transparent(layer)
        for index in range(len(layer.inputs)):
            assert formats.required[layer.name, index] == formats.produced[layer.name]
    kinds = [c.kind for c in formats.conversions(graph)]
    assert len(kinds) == (0 if name == "float32" else 2)


def test_graph_inputs_and_outputs_are_float32() -> None:
    """Whatever happens inside."""
    graph = graph_of([("pool", POOL, ("x",))], "pool")
    formats = assign_formats(graph, {"pool": INT8}, all_scales(graph))
    assert formats.produced["x"] == FLOAT32_FORMAT
    assert formats.conversions(graph)[-1] == Conversion("pool", SIGNED, FLOAT32_FORMAT)


def test_an_input_that_is_an_output_stays_float() -> None:
    """A graph that hands an input through converts nothing."""
    graph = graph_of([("a", CONVOLUTION, ("x",))], "a", "x")
    formats = assign_formats(graph, {"a": FLOAT32}, {})
    assert formats.conversions(graph) == ()


def test_missing_scale_names_layer_precision_and_tensor() -> None:
    """So that a person who edited a plan knows which line lacks what."""
    graph = graph_of([("a", CONVOLUTION, ("x",)), ("b", CONVOLUTION, ("a",))], "b")
    with pytest.raises(PrecisionError, match="layer b in a16w8 reads a, whose uint16 scale is not known"):
        assign_formats(graph, {"a": A8W8, "b": A16W8}, {"x": ALL, "a": {"uint8": BYTE}})


def test_codes_are_named_by_activation_width() -> None:
    """The keys of plan.json."""
    names = {p: codes_name(parse_precision(p)) for p in ("a8w8", "a8w2", "a16w16", "a6w4", "int8")}
    assert names == {"a8w8": "uint8", "a8w2": "uint8", "a16w16": "uint16", "a6w4": "uint6", "int8": "int8"}


@given(
    st.lists(st.sampled_from(["a8w8", "int8", "a16w8", "float16", "bfloat16", "float32", "w4"]), min_size=4, max_size=4)
)
@settings(max_examples=60, deadline=None)
def test_every_read_is_either_as_written_or_converted_once(names: list[str]) -> None:
    """Over random plans: conversions are exactly the pairs that differ, without duplicates, and none is an identity."""
    graph = graph_of(
        [
            ("a", CONVOLUTION, ("x",)), ("b", CONVOLUTION, ("a",)), ("sum", Add(SHAPE), ("a", "b")),
            ("joined", Concat((SHAPE, SHAPE), 3), ("a", "sum")), ("c", CONVOLUTION, ("sum",)), ("d", CONVOLUTION, ("joined",)),
        ],
        "c", "d", "sum",
    )  # fmt: skip
    anchors = dict(zip("abcd", map(parse_precision, names), strict=True))
    followed = follow_consumers(graph, anchors, {})
    precisions = {**anchors, **{name: f.precision for name, f in followed.items()}}
    formats = assign_formats(graph, precisions, all_scales(graph))
    found = formats.conversions(graph)
    assert len(set(found)) == len(found)
    assert all(c.source != c.target for c in found)
    wanted = {
        (tensor, formats.required[layer.name, i])
        for layer in graph.layers
        for i, tensor in enumerate(layer.inputs)
        if formats.produced[tensor] != formats.required[layer.name, i]
    } | {(t, FLOAT32_FORMAT) for t in graph.outputs if formats.produced[t] != FLOAT32_FORMAT}
    assert {(c.tensor, c.target) for c in found} == wanted
    for layer in graph.layers:
        if not is_transparent(layer) and not precisions[layer.name].is_integer:
            assert not formats.produced[layer.name].is_integer, "a float kernel cannot write codes"


def test_float16_layers_of_one_width_meet_without_a_cast() -> None:
    """16-bit storage is kept between layers, which is where its speed comes from."""
    graph = graph_of([("a", CONVOLUTION, ("x",)), ("b", CONVOLUTION, ("a",))], "b")
    formats = assign_formats(graph, {"a": FLOAT16, "b": FLOAT16}, {})
    assert formats.produced["a"] == TensorFormat("float16")
    assert [c.kind for c in formats.conversions(graph)] == ["cast"]
