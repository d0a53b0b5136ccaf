"""Small ONNX models of what networks hold beyond convolutions: blocks of known architectures, single operators, opsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.compose

from tests.onnx_models import node, onnx_model, random_weights

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class NetworkCase:
    """A model, and the names of the Relax operators in it that no kernel of this project computes."""

    name: str
    model: Any
    opaque: frozenset[str] = frozenset()


_LEFT_TO_TVM = {
    "sqrt": "sqrt",
    "log_softmax": "nn.log_softmax",
    "depth_to_space": "call_tir",
    "expand": "broadcast_to",
    "lp_pool": "multiply power",
    "mean_over_channels": "add mean",
    "mean_over_rows": "mean",
    "sum_over_all": "sum",
    "cast": "astype floor_mod greater_equal isfinite logical_not permute_dims subtract where",
    "greater_where": "greater where",
    "arg_max": "add argmax astype",
    "scalar_output": "mean",
    "embedding": "add less mean take where",
    "shared_weights": "subtract",
}
"""For each model the operators that no kernel of this project computes: they stay in float32."""


def _case(
    name: str,
    nodes: Sequence[Any],
    weights: Mapping[str, Array] | None = None,
    **options: Any,
) -> NetworkCase:
    return _named(name, onnx_model(nodes, weights, **options))


def _named(name: str, model: Any) -> NetworkCase:
    return NetworkCase(name, model, frozenset(f"relax.{o}" for o in _LEFT_TO_TVM.get(name, "").split()))


_SAME = {"pads": [1, 1, 1, 1]}
_STEM = random_weights(1, stem_w=(8, 4, 3, 3), stem_b=(8,))
_STEM_NODE = node("Conv", "x stem_w stem_b", "stem", **_SAME)
_HEAD = random_weights(2, head_w=(8, 8, 1, 1))


def _between(
    name: str, nodes: Sequence[Any], weights: Mapping[str, Array] | None = None, **options: Any
) -> NetworkCase:
    """Nodes from ``stem`` [1, 8, 8, 8] to ``last`` [1, 8, …] between two convolutions."""
    every = [_STEM_NODE, *nodes, node("Conv", "last head_w", "y")]
    return _case(name, every, {**_STEM, **_HEAD, **(weights or {})}, **options)


def _integers(**values: int | Sequence[int]) -> dict[str, Array]:
    return {name: np.asarray(v, np.int64) for name, v in values.items()}


def block_cases() -> list[NetworkCase]:
    """Blocks of architectures that people bring."""
    return [_mobilenet_v3(), _efficientnet(), _autoencoder(), _transformer(), _dense_net(), _unet(), _text_classifier()]


def _mobilenet_v3() -> NetworkCase:
    weights = random_weights(
        3, up=(16, 8, 1, 1), dw=(16, 1, 3, 3), s1=(4, 16, 1, 1), s2=(16, 4, 1, 1), down=(8, 16, 1, 1)
    )
    return _between(
        "mobilenet_v3",
        [
            node("HardSwish", "stem", "a"),
            node("Conv", "a up", "b"),
            node("Conv", "b dw", "c", group=16, **_SAME),
            node("HardSwish", "c", "d"),
            node("GlobalAveragePool", "d", "pool"),
            node("Conv", "pool s1", "squeezed"),
            node("Relu", "squeezed", "r"),
            node("Conv", "r s2", "excited"),
            node("HardSigmoid", "excited", "gate", alpha=1 / 6, beta=0.5),
            node("Mul", "d gate", "scaled"),
            node("Conv", "scaled down", "e"),
            node("Add", "e a", "last"),
        ],
        weights,
        opset=14,
    )


def _efficientnet() -> NetworkCase:
    weights = random_weights(4, dw=(8, 1, 3, 3), s1=(2, 8, 1, 1), s2=(8, 2, 1, 1))
    return _between(
        "efficientnet",
        [
            node("Sigmoid", "stem", "sg"),
            node("Mul", "stem sg", "a"),
            node("Conv", "a dw", "b", group=8, **_SAME),
            node("ReduceMean", "b", "pool", axes=[2, 3], keepdims=1),
            node("Conv", "pool s1", "c"),
            node("Sigmoid", "c", "csg"),
            node("Mul", "c csg", "d"),
            node("Conv", "d s2", "e"),
            node("Sigmoid", "e", "gate"),
            node("Mul", "gate b", "f"),
            node("Add", "f a", "last"),
        ],
        weights,
    )


def _autoencoder() -> NetworkCase:
    weights = random_weights(5, w1=(640, 16), b1=(16,), w2=(16, 8), w3=(8, 16), w4=(16, 640), b4=(640,))
    weights["w1"] /= 10
    for index, size in ((1, 16), (2, 8), (3, 16)):
        extra = {f"g{index}": (size,), f"s{index}": (size,), f"m{index}": (size,), f"v{index}_variance": (size,)}
        weights |= random_weights(50 + index, **extra)
    nodes = []
    tensor = "x"
    for index in (1, 2, 3):
        bias = " b1" if index == 1 else ""
        norm = f"d{index} g{index} s{index} m{index} v{index}_variance"
        nodes += [
            node("Gemm", f"{tensor} w{index}{bias}", f"d{index}"),
            node("BatchNormalization", norm, f"n{index}"),
            node("Relu", f"n{index}", f"r{index}"),
        ]
        tensor = f"r{index}"
    return _case("autoencoder", [*nodes, node("Gemm", "r3 w4 b4", "y")], weights, inputs={"x": (1, 640)})


def _transformer() -> NetworkCase:
    names = ("wq", "wk", "wv", "wo")
    weights = random_weights(6, **dict.fromkeys(names, (16, 16)), w1=(16, 32), b1=(32,), w2=(32, 16), b2=(16,))
    weights |= random_weights(7, g1=(16,), s1=(16,), g2=(16,), s2=(16,))
    weights["scale"] = np.float32(0.35)
    weights |= _integers(split=[1, 6, 2, 8], joined=[1, 6, 16])
    nodes = [node("LayerNormalization", "x g1 s1", "n")]
    for letter, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", f"n w{letter}", f"{letter}0"),
            node("Reshape", f"{letter}0 split", f"{letter}1"),
            node("Transpose", f"{letter}1", letter, perm=order),
        ]
    nodes += [
        node("MatMul", "q k", "products"),
        node("Mul", "products scale", "scaled"),
        node("Softmax", "scaled", "attention", axis=-1),
        node("MatMul", "attention v", "heads"),
        node("Transpose", "heads", "turned", perm=[0, 2, 1, 3]),
        node("Reshape", "turned joined", "context"),
        node("MatMul", "context wo", "out"),
        node("Add", "x out", "h"),
        node("LayerNormalization", "h g2 s2", "n2"),
        node("MatMul", "n2 w1", "m1"),
        node("Add", "m1 b1", "m2"),
        node("Gelu", "m2", "m3"),
        node("MatMul", "m3 w2", "m4"),
        node("Add", "m4 b2", "m5"),
        node("Add", "h m5", "y"),
    ]
    return _case(
        "transformer",
        nodes,
        weights,
        inputs={"x": (1, 6, 16)},
        opset=20,
    )


def _dense_net() -> NetworkCase:
    shape = random_weights(8, g=(8,), s=(8,), m=(8,), v_variance=(8,), grow=(4, 8, 3, 3), merge=(8, 12, 1, 1))
    return _between(
        "densenet",
        [
            node("BatchNormalization", "stem g s m v_variance", "n"),
            node("Relu", "n", "r"),
            node("Conv", "r grow", "new", **_SAME),
            node("Concat", "stem new", "both", axis=1),
            node("Conv", "both merge", "merged"),
            node("AveragePool", "merged", "last", kernel_shape=[2, 2], strides=[2, 2]),
        ],
        shape,
    )


def _unet() -> NetworkCase:
    weights = random_weights(9, low=(8, 8, 3, 3), up=(8, 8, 2, 2), merge=(8, 16, 3, 3))
    return _between(
        "unet",
        [
            node("Relu", "stem", "r"),
            node("MaxPool", "r", "small", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", "small low", "l", **_SAME),
            node("Relu", "l", "lr"),
            node("ConvTranspose", "lr up", "u", strides=[2, 2]),
            node("Concat", "u r", "both", axis=1),
            node("Conv", "both merge", "m", **_SAME),
            node("Relu", "m", "last"),
        ],
        weights,
    )


def _text_classifier() -> NetworkCase:
    weights = random_weights(10, c1=(8, 4, 3), b1=(8,), c2=(8, 8, 3), w=(8, 5), b=(5,))
    return _case(
        "conv1d",
        [
            node("Conv", "x c1 b1", "a", pads=[1, 1]),
            node("Relu", "a", "r"),
            node("Conv", "r c2", "d", pads=[1, 1], strides=[2]),
            node("GlobalMaxPool", "d", "g"),
            node("Flatten", "g", "f"),
            node("Gemm", "f w b", "y"),
        ],
        weights,
        inputs={"x": (1, 4, 16)},
    )


def activation_cases() -> list[NetworkCase]:
    """Every activation between two convolutions."""
    constants = {"lo": np.float32(-0.5), "half": np.float32(0.5), "one": np.float32(1.0), "root": np.float32(2**0.5)}
    slopes = {"slope": random_weights(11, a=(8, 1, 1))["a"]}
    erf = [
        node("Div", "stem root", "d"),
        node("Erf", "d", "e"),
        node("Add", "e one", "p"),
        node("Mul", "stem p", "m"),
        node("Mul", "m half", "last"),
    ]
    simple = [
        ("Relu", {}), ("Sigmoid", {}), ("Tanh", {}), ("Exp", {}), ("Elu", {"alpha": 0.7}), ("Selu", {}), ("Softplus", {}),
        ("LeakyRelu", {"alpha": 0.1}), ("HardSigmoid", {"alpha": 0.25}), ("HardSwish", {}), ("Abs", {}),
        ("Mish", {}), ("ThresholdedRelu", {"alpha": 0.3}), ("Softsign", {}), ("Erf", {}), ("Neg", {}), ("Floor", {}),
    ]  # fmt: skip
    cases = [_between(kind.lower(), [node(kind, "stem", "last", **options)], opset=20) for kind, options in simple]
    cases.append(_between("sqrt", [node("Relu", "stem", "r"), node("Sqrt", "r", "last")], opset=20))
    cases.append(_between("gelu", [node("Gelu", "stem", "last")], opset=20))
    cases.append(_between("gelu_tanh", [node("Gelu", "stem", "last", approximate="tanh")], opset=20))
    cases.append(_between("gelu_by_erf", erf, constants, opset=20))
    cases.append(_between("prelu", [node("PRelu", "stem slope", "last")], slopes, opset=20))
    cases.append(_between("prelu_of_one_slope", [node("PRelu", "stem half", "last")], constants, opset=20))
    cases.append(_between("clip_with_only_min", [node("Clip", "stem lo", "last")], constants, opset=20))
    cases.append(_between("softmax_in_the_middle", [node("Softmax", "stem", "last", axis=1)], opset=20))
    cases.append(_between("log_softmax", [node("LogSoftmax", "stem", "last", axis=1)], opset=20))
    return cases


def operator_cases() -> list[NetworkCase]:
    """Operators that move, resize, reduce or combine feature maps, between two convolutions."""
    ends = _integers(b=[1, 1], e=[7, 8], a=[2, 3], s=[1, 2], idx=[3, 1, 2], pads=[0, 0, 1, 2, 0, 0, 1, 2])
    resize = {"scales": np.float32([1, 1, 2, 2])}
    flags = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    bilinear = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    half = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    eight = random_weights(12, c=(8, 1, 1), t=(8,), u_variance=(8,))
    return [
        _between("resize_nearest", [node("Resize", "stem - scales", "last", **flags)], resize),
        _between("resize_linear", [node("Resize", "stem - scales", "last", **bilinear)], resize),
        _between("split", [node("Split", "stem", "p q", axis=1), node("Concat", "q p", "last", axis=1)]),
        _between("split_rows", [node("Split", "stem", "p q", axis=2), node("Add", "q p", "last")]),
        _between("split_by_computed_sizes", [
            node("Shape", "stem", "s"), node("Gather", "s one", "c"), node("Div", "c two", "h"),
            node("Unsqueeze", "h zero", "e"), node("Slice", "stem zero e one_axis", "p"), node("Concat", "p p", "last", axis=1),
        ], _integers(one=1, two=2, zero=[0], one_axis=[1])),
        _between("slice", [node("Slice", "stem b e a s", "last")], ends),
        _between("gather", [node("Gather", "stem idx", "last", axis=2)], ends),
        _between("pad_reflect", [node("Pad", "stem pads", "last", mode="reflect")], ends),
        _between("pad_edge", [node("Pad", "stem pads", "last", mode="edge")], ends),
        _between("pad_before_pool", [node("Pad", "stem pads", "p"), node("MaxPool", "p", "last", **half)], ends),
        _between("depth_to_space", [node("DepthToSpace", "stem", "d", blocksize=2), node("Tile", "d rep", "last")],
                 _integers(rep=[1, 4, 1, 1])),
        _between("space_to_depth", [node("SpaceToDepth", "stem", "d", blocksize=2), node("Conv", "d wide", "last")],
                 random_weights(13, wide=(8, 32, 1, 1))),
        _between("transpose", [node("Transpose", "stem", "last", perm=[0, 1, 3, 2])]),
        _between("expand", [node("GlobalAveragePool", "stem", "g"), node("Expand", "g shape", "last")],
                 _integers(shape=[1, 8, 4, 4])),
        _between("subtract", [node("Relu", "stem", "r"), node("Sub", "stem r", "last")]),
        _between("multiply", [node("Relu", "stem", "r"), node("Mul", "stem r", "last")]),
        _between("divide", [node("Exp", "stem", "r"), node("Div", "stem r", "last")]),
        _between("maximum", [node("Relu", "stem", "r"), node("Max", "stem r", "last")]),
        _between("multiply_by_constant", [node("Relu", "stem", "r"), node("Mul", "r c", "last")], eight),
        _between("add_to_itself", [node("Add", "stem stem", "last")]),
        _between("global_max_pool", [node("GlobalMaxPool", "stem", "last")]),
        _between("max_pool_dilated", [node("MaxPool", "stem", "last", kernel_shape=[2, 2], dilations=[2, 2])]),
        _between("average_pool_counted", [node("AveragePool", "stem", "last", count_include_pad=1, **half)]),
        _between("lp_pool", [node("LpPool", "stem", "last", kernel_shape=[2, 2], p=2)]),
        _between("mean_over_channels", [node("ReduceMean", "stem", "m", axes=[1]), node("Add", "m stem", "last")]),
        _between("mean_over_rows", [node("ReduceMean", "stem", "last", axes=[2])]),
        _between("sum_over_all", [node("ReduceSum", "stem axes", "last")], _integers(axes=[2, 3])),
        _between("max_over_all", [node("ReduceMax", "stem", "last", axes=[2, 3])]),
        _between("instance_norm", [node("InstanceNormalization", "stem t u_variance", "last")], eight),
        _between("group_norm", [
            node("Reshape", "stem grouped", "g"), node("InstanceNormalization", "g ones zeros", "n"),
            node("Reshape", "n ungrouped", "u"), node("Mul", "u c", "m"), node("Add", "m c", "last"),
        ], {**eight, **_integers(grouped=[0, 2, -1], ungrouped=[1, 8, 8, 8]),
            "ones": np.ones(2, np.float32), "zeros": np.zeros(2, np.float32)}),
        _between("layer_norm_by_operators", [
            node("Transpose", "stem", "s", perm=[0, 2, 3, 1]), node("ReduceMean", "s", "m", axes=[-1]),
            node("Sub", "s m", "d"), node("Pow", "d two", "p"), node("ReduceMean", "p", "v", axes=[-1]),
            node("Add", "v epsilon", "e"), node("Sqrt", "e", "r"), node("Div", "d r", "q"), node("Mul", "q t", "g"),
            node("Add", "g u_variance", "z"), node("Transpose", "z", "last", perm=[0, 3, 1, 2]),
        ], {**eight, "two": np.float32(2), "epsilon": np.float32(1e-5)}),
        _between("einsum", [
            node("Einsum", "stem stem", "p", equation="b c h w, b c v w -> b c v h"),
            node("Einsum", "p wide", "d", equation="bchw,wv->bchv"),
            node("Einsum", "stem d", "last", equation="bchj,bcjv->bchv"),
        ], {"wide": random_weights(15, wide=(8, 8))["wide"] / 100}),
        _between("attention_bias", [
            node("Add", "stem bias", "b"), node("Reshape", "b split", "s"), node("Add", "s mask", "m"),
            node("Reshape", "m joined", "j"), node("Softmax", "j", "last", axis=-1),
        ], {**random_weights(16, bias=(1, 1, 8, 8), mask=(1, 2, 1, 8, 8)),
            **_integers(split=[1, 2, 4, 8, 8], joined=[1, 8, 8, 8])}),
        _between("lrn", [node("LRN", "stem", "last", size=3, alpha=0.3, beta=0.6, bias=2.0)]),
        _between("identity_and_dropout", [node("Identity", "stem", "i"), node("Dropout", "i", "last")]),
        _between("cast", [node("Cast", "stem", "i", to=6), node("Cast", "i", "last", to=1)]),
        _between("greater_where", [node("Greater", "stem c", "g"), node("Where", "g stem c", "last")], eight),
        _between("arg_max", [node("ArgMax", "stem", "i", axis=1), node("Cast", "i", "f", to=1), node("Add", "f stem", "last")]),
    ]  # fmt: skip


def structure_cases() -> list[NetworkCase]:
    """Several inputs and outputs, networks without weights, batches, tensors that are read and leave."""
    two = {"x": (1, 4, 8, 8), "z": (1, 4, 8, 8)}
    weights = random_weights(14, w=(8, 4, 3, 3), v=(8, 4, 3, 3), fw=(512, 5), k=(6, 5))
    left, right = node("Conv", "x w", "a", **_SAME), node("Conv", "z v", "b", **_SAME)
    return [
        _case("two_inputs", [left, right, node("Add", "a b", "y")], weights, inputs=two),
        _case("two_inputs_joined", [left, right, node("Concat", "a b", "y", axis=1)], weights, inputs=two),
        _case("inputs_of_two_ranks", [left, node("GlobalAveragePool", "a", "g"), node("Flatten", "g", "f"),
              node("Concat", "f z", "y", axis=1)], weights, inputs={"x": (1, 4, 8, 8), "z": (1, 6)}),
        _case("two_outputs", [left, node("Relu", "a", "y"), node("MaxPool", "y", "q", kernel_shape=[2, 2])],
              weights, outputs="y q"),
        _case("output_that_is_read", [left, node("Conv", "a u", "y")], {**weights, **random_weights(15, u=(8, 8, 1, 1))},
              outputs="a y"),
        _case("one_tensor_under_two_names", [left, node("Relu", "a", "y"), node("Identity", "y", "q")], weights, outputs="y q"),
        _case("input_as_output", [left, node("Relu", "a", "y"), node("Identity", "x", "q")], weights, outputs="y q"),
        _case("scalar_output", [left, node("ReduceMean", "a", "y", keepdims=0)], weights),
        _words(),
        _case("no_weights", [node("MaxPool", "x", "p", kernel_shape=[2, 2]), node("Sigmoid", "p", "y")]),
        _case("flatten_then_gemm", [left, node("Flatten", "a", "f"), node("Gemm", "f fw", "y")], weights),
        _case("dense_on_three_axes", [node("MatMul", "x k", "m"), node("Relu", "m", "r"), node("MatMul", "r many", "p"),
              node("MatMul", "p many_again", "q"), node("MatMul", "left q", "y")],
              {**weights, **random_weights(18, many=(3, 5, 4), many_again=(3, 4, 4), left=(6, 7))}, inputs={"x": (1, 7, 6)}),
        _case("batch_of_two", [left, node("GlobalAveragePool", "a", "g"), node("Flatten", "g", "y")], weights,
              inputs={"x": (2, 4, 8, 8)}),
        _case("constant_weights", [left, node("Transpose", "ft", "t", perm=[1, 0]), node("Flatten", "a", "f"),
              node("MatMul", "f t", "y")], {**weights, "ft": weights["fw"].T.copy()}),
        _case("shared_weights", [left, node("Conv", "z w", "b", **_SAME), node("Sub", "a b", "d"), node("Abs", "d", "y")],
              weights, inputs=two),
    ]  # fmt: skip


def _words() -> NetworkCase:
    """Whole numbers in: a mean of embeddings."""
    nodes = [
        node("Gather", "table x", "e"),
        node("ReduceMean", "e", "m", axes=[1], keepdims=0),
        node("Gemm", "m fw", "y"),
    ]
    weights = random_weights(17, table=(10, 6), fw=(6, 5))
    model = onnx_model(nodes, weights, inputs={"x": (1, 7)}, dtype=onnx.TensorProto.INT64)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return _named("embedding", model)


def opset_cases() -> list[NetworkCase]:
    """One small classifier in the spelling of several opsets."""
    weights = random_weights(16, w=(8, 4, 3, 3), g=(8,), s=(8,), m=(8,), v_variance=(8,), fw=(8, 5), fb=(5,))
    weights |= {"lo": np.float32(0), "hi": np.float32(6)}
    weights |= _integers(spatial=[2, 3])
    cases = []
    for opset in (9, 11, 13, 17, 18, 21, min(onnx.defs.onnx_opset_version(), 25)):
        clip = node("Clip", "n", "c", min=0.0, max=6.0) if opset < 11 else node("Clip", "n lo hi", "c")
        mean = (
            node("ReduceMean", "c", "p", axes=[2, 3], keepdims=0)
            if opset < 18
            else node("ReduceMean", "c spatial", "p", keepdims=0)
        )
        nodes = [
            node("Conv", "x w", "k", **_SAME),
            node("BatchNormalization", "k g s m v_variance", "n"),
            clip,
            mean,
            node("Gemm", "p fw fb", "l"),
            node("Softmax", "l", "y", axis=1),
        ]
        model = onnx_model(nodes, weights, opset=opset)
        model.ir_version = 10 if opset > 21 else 8
        cases.append(NetworkCase(f"opset_{opset}", model))
    return cases


def merged_cases(name: str, cases: Sequence[NetworkCase], opset: int) -> NetworkCase:
    """All cases side by side in one model of one opset: kernels that they share are compiled once."""
    graph = onnx.GraphProto(name=name)
    for case in cases:
        part = onnx.compose.add_prefix_graph(case.model.graph, f"{case.name}_")
        graph.node.extend(part.node)
        graph.initializer.extend(part.initializer)
        graph.input.extend(part.input)
        graph.output.extend(part.output)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    return NetworkCase(name, model, frozenset().union(*(case.opaque for case in cases)))


def network_cases() -> list[NetworkCase]:
    """All of them, single operators merged into two models."""
    return [
        *block_cases(),
        merged_cases("activations", activation_cases(), 20),
        merged_cases("operators", operator_cases(), 13),
        *structure_cases(),
    ]
