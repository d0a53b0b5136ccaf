"""Small ONNX models, one for each spelling that ``canonicalize`` and ``convert_layout`` handle, with what must be left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.onnx_models import node, onnx_model, random_weights


@dataclass(frozen=True, eq=False)
class Case:
    """A model and the operators that its ``main`` holds after both passes, sorted.

    The permute_dims that a channels-last graph needs at its ends are counted too.
    """

    name: str
    model: Any
    operators: str


CONV = random_weights(w=(6, 4, 3, 3), b=(6,))
_BN = random_weights(2, gamma=(6,), beta=(6,), mean=(6,), variance=(6,))
_BN4 = random_weights(3, gamma=(4,), beta=(4,), mean=(4,), variance=(4,))
_BN_INPUTS = "gamma beta mean variance"
ENDS = " permute_dims permute_dims"


def _numbers(**values: Any) -> dict[str, Any]:
    return {name: np.asarray(v, np.float32 if isinstance(v, float) else np.int64) for name, v in values.items()}


def clip_cases() -> list[Case]:
    limits = {"lo": np.float32(0.0), "hi": np.float32(1.0)}
    conv = node("Conv", "x w b", "c", pads=[1, 1, 1, 1])
    return [
        Case("clip", onnx_model([conv, node("Clip", "c lo hi", "y")], CONV | limits), "add clip conv2d" + ENDS),
        Case("clip_with_attributes", onnx_model([node("Clip", "x", "y", min=-0.5, max=0.5)], opset=9), "clip"),
        Case("clip_from_zero", onnx_model([node("Clip", "x lo", "y")], limits), "nn.relu"),
        Case("clip_upper_only", onnx_model([node("Clip", "x - hi", "y")], limits), "clip"),
        Case("clip_reversed", onnx_model([node("Clip", "x hi lo", "y")], limits), "clip"),
        Case("relu_then_clip", onnx_model([node("Relu", "x", "r"), node("Clip", "r - hi", "y")], limits), "clip"),
    ]


def affine_cases() -> list[Case]:
    conv, biased = node("Conv", "x w", "c"), node("Conv", "x w b", "c")
    batch_norm = node("BatchNormalization", f"c {_BN_INPUTS}", "y")
    vectors = random_weights(4, s=(6,), t=(6,))
    scaled = [node("Unsqueeze", "s axes", "s3"), node("Mul", "n s3", "m"), node("Unsqueeze", "t axes", "t3")]
    scaled.append(node("Add", "t3 m", "y"))
    dense = random_weights(5, dw=(5, 6), db=(6,), dt=(6, 5))
    rows = {"x": (2, 5)}
    normalized = random_weights(6, offset=(4, 1, 1), deviation_variance=(4, 1, 1))
    return [
        Case("batch_norm", onnx_model([conv, batch_norm], CONV | _BN), "add conv2d" + ENDS),
        Case("batch_norm_after_bias", onnx_model([biased, batch_norm], CONV | _BN), "add conv2d" + ENDS),
        Case(
            "batch_norm_alone",
            onnx_model([node("BatchNormalization", f"x {_BN_INPUTS}", "y")], _BN4),
            "add conv2d" + ENDS,
        ),
        Case(
            "batch_norm_of_shared_tensor",
            onnx_model([conv, node("BatchNormalization", f"c {_BN_INPUTS}", "n"), node("Add", "n c", "y")], CONV | _BN),
            "add add conv2d conv2d" + ENDS,
        ),
        Case(
            "scale_and_shift_after_batch_norm",
            onnx_model(
                [conv, node("BatchNormalization", f"c {_BN_INPUTS}", "n"), *scaled],
                CONV | _BN | vectors | {"axes": np.array([1, 2])},
            ),
            "add conv2d" + ENDS,
        ),
        Case(
            "input_normalization",
            onnx_model([node("Sub", "x offset", "d"), node("Div", "d deviation_variance", "y")], normalized),
            "add conv2d" + ENDS,
        ),
        Case(
            "dense",
            onnx_model([node("MatMul", "x dw", "p"), node("Add", "db p", "y")], dense, rows),
            "add matmul",
        ),
        Case(
            "gemm",
            onnx_model([node("Gemm", "x dt db", "y", transB=1, alpha=0.5, beta=2.0)], dense, rows),
            "add matmul",
        ),
        Case(
            "batch_norm_after_dense",
            onnx_model([node("MatMul", "x dw", "c"), batch_norm], dense | _BN, rows),
            "add matmul",
        ),
        Case(
            "batch_norm_of_rows",
            onnx_model([node("BatchNormalization", f"x {_BN_INPUTS}", "y")], _BN, {"x": (3, 6)}),
            "add multiply",
        ),
    ]


def matmul_cases() -> list[Case]:
    """Products with constant matrices on either side: as many as there are in the batch, one for all, several for each."""
    heads = random_weights(9, right=(3, 5, 6), left=(3, 6, 4), one=(1, 5, 6), first=(6, 4))
    spread = random_weights(10, apart=(2, 1, 5, 6))

    def product(name: str, factors: str, operators: str, shape: tuple[int, ...] = (3, 4, 5)) -> Case:
        weights = {k: v for k, v in (heads | spread).items() if k in factors.split()}
        return Case(name, onnx_model([node("MatMul", factors, "y")], weights, {"x": shape}), operators)

    turned = "conv2d permute_dims permute_dims reshape reshape"
    return [
        product("matrix_for_each", "x right", turned + " reshape reshape"),
        product("matrix_for_each_of_a_batch", "x right", turned, (2, 3, 4, 5)),
        product("matrices_for_one", "x right", "matmul permute_dims reshape reshape", (4, 5)),
        product("matrices_for_some", "x apart", "matmul", (2, 3, 4, 5)),
        product("matrix_with_an_axis", "x one", "matmul"),
        product("matrix_on_the_left", "first x", turned),
        product("matrices_on_the_left", "left x", turned),
    ]


def padding_cases() -> list[Case]:
    pads = {"p": np.array([0, 0, 1, 0, 0, 0, 0, 2])}
    pad = node("Pad", "x p", "q")
    ones = {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    average = node("AveragePool", "q", "y", kernel_shape=[3, 3], strides=[2, 2])
    return [
        Case(
            "pad_then_conv",
            onnx_model([pad, node("Conv", "q w", "y", pads=[1, 0, 0, 1])], CONV | pads),
            "conv2d" + ENDS,
        ),
        Case(
            "conv_same_upper",
            onnx_model([node("Conv", "x w", "y", auto_pad="SAME_UPPER", strides=[2, 2])], CONV),
            "conv2d" + ENDS,
        ),
        Case(
            "conv_same_lower",
            onnx_model([node("Conv", "x w", "y", auto_pad="SAME_LOWER", strides=[2, 2])], CONV),
            "conv2d" + ENDS,
        ),
        Case("pad_then_average_pool", onnx_model([pad, average], pads), "nn.avg_pool2d" + ENDS),
        Case(
            "pad_then_max_pool",
            onnx_model([pad, node("MaxPool", "q", "y", kernel_shape=[2, 2], strides=[2, 2])], pads),
            "nn.max_pool2d nn.pad" + ENDS,
        ),
        Case(
            "pad_with_number",
            onnx_model([node("Pad", "x p v", "q"), node("Conv", "q w", "y")], CONV | ones | {"v": np.float32(0.5)}),
            "conv2d nn.pad" + ENDS,
        ),
        # Another loop nest from the importer, which must not be taken for the pad that its name resembles.
        Case("reflecting_pad", onnx_model([node("Pad", "x p", "y", mode="reflect")], ones), "take take"),
        Case(
            "pad_that_repeats_its_edge",
            onnx_model(
                [node("Pad", "x p - a", "y", mode="edge")], {"p": np.array([2, 0]), "a": np.array([-1])}, opset=18
            ),
            "take",
        ),
        Case(
            "pad_channels",
            onnx_model([node("Relu", "x", "r"), node("Pad", "r p", "y")], {"p": np.array([0, 2, 0, 0, 0, 1, 0, 0])}),
            "nn.pad nn.relu",
        ),
    ]


def pooling_cases() -> list[Case]:
    def pooled(kind: str, **attributes: Any) -> Any:
        return onnx_model([node(kind, "x", "y", **attributes)])

    window = {"kernel_shape": [3, 3], "strides": [2, 2]}
    return [
        Case("max_pool_ceil", pooled("MaxPool", ceil_mode=1, **window), "nn.max_pool2d" + ENDS),
        Case("average_pool_ceil", pooled("AveragePool", ceil_mode=1, **window), "nn.avg_pool2d" + ENDS),
        Case(
            "average_pool_uncounted",
            pooled("AveragePool", pads=[1, 0, 0, 1], ceil_mode=1, **window),
            "nn.avg_pool2d" + ENDS,
        ),
        Case(
            "average_pool_counted",
            pooled("AveragePool", pads=[1, 1, 1, 1], count_include_pad=1, kernel_shape=[3, 3]),
            "nn.avg_pool2d" + ENDS,
        ),
        Case("average_pool_of_everything", pooled("AveragePool", kernel_shape=[8, 8]), "mean permute_dims reshape"),
        Case("global_average_pool", pooled("GlobalAveragePool"), "mean permute_dims reshape"),
        Case("reduce_mean", pooled("ReduceMean", axes=[-1, -2], keepdims=0), "mean permute_dims reshape"),
        Case(
            "instance_normalization",
            onnx_model([node("Conv", "x w b", "c"), node("InstanceNormalization", "c gamma beta", "y")], CONV | _BN),
            "add conv2d nn.group_norm" + ENDS,
        ),
        *_normalizations(),
        Case(
            "local_response_normalization",
            pooled("LRN", size=3, alpha=0.3, beta=0.6, bias=2.0),
            "add avg_pool3d divide multiply multiply power reshape reshape",
        ),
    ]


def _normalizations() -> list[Case]:
    """As exporters write them for opsets that have no such operator."""
    weights = CONV | random_weights(
        13, gamma=(6,), beta=(6,), own=(6, 1, 1), shift=(6, 1, 1), rows=(8, 8), lines=(8, 8)
    )
    weights |= _numbers(two=2.0, epsilon=1e-5, half=0.5, one=1.0)
    weights |= {"grouped": np.array([0, 3, -1], np.int64), "ungrouped": np.array([1, 6, 8, 8], np.int64)}
    weights |= {"ones": np.ones(3, np.float32), "zeros": np.zeros(3, np.float32)}
    conv = node("Conv", "x w b", "c", pads=[1, 1, 1, 1])

    def deviation(tensor: str, axes: list[int], square: Any) -> list[Any]:
        return [
            node("ReduceMean", tensor, "m", axes=axes),
            node("Sub", f"{tensor} m", "d"),
            square,
            node("ReduceMean", "s", "v", axes=axes),
            node("Add", "v epsilon", "e"),
        ]

    power, product = node("Pow", "d two", "s"), node("Mul", "d d", "s")
    turned, back = node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Transpose", "z", "y", perm=[0, 3, 1, 2])
    root, divided = node("Sqrt", "e", "r"), node("Div", "d r", "q")
    last = [
        conv, turned, *deviation("t", [-1], power), root, divided,
        node("Mul", "q gamma", "g"), node("Add", "beta g", "z"), back,
    ]  # fmt: skip
    maps = [
        conv, *deviation("c", [2, 3], product), root, node("Div", "one r", "i"), node("Mul", "i d", "q"),
        node("Mul", "q own", "g"), node("Sub", "g shift", "y"),
    ]  # fmt: skip
    groups = [
        conv, node("Reshape", "c grouped", "t"), node("InstanceNormalization", "t ones zeros", "n"),
        node("Reshape", "n ungrouped", "q"), node("Mul", "q own", "g"), node("Add", "g shift", "y"),
    ]  # fmt: skip
    powers = [conv, turned, *deviation("t", [3], power), node("Pow", "e half", "r"), node("Div", "d r", "z"), back]
    # The variance is that of another tensor: no normalization.
    other = [
        conv, node("ReduceMean", "c", "m", axes=[-1]), node("Sub", "c m", "d"), node("Mul", "c c", "s"),
        node("ReduceMean", "s", "v", axes=[-1]), node("Add", "v epsilon", "e"), root, node("Div", "d r", "y"),
    ]  # fmt: skip
    return [
        Case("layer_norm_of_operators", onnx_model(last, weights), "add conv2d nn.layer_norm" + ENDS),
        Case("instance_norm_of_operators", onnx_model(maps, weights), "add conv2d nn.group_norm" + ENDS),
        Case("group_norm_of_instance_norm", onnx_model(groups, weights), "add conv2d nn.group_norm" + ENDS),
        Case("layer_norm_by_powers", onnx_model(powers, weights), "add conv2d nn.layer_norm" + ENDS),
        Case(
            "no_normalization",
            onnx_model(other, weights),
            "add add conv2d divide mean mean multiply sqrt subtract" + ENDS,
        ),
    ]


def sequence_cases() -> list[Case]:
    weights = random_weights(12, w=(6, 2, 3), v=(6, 1, 3), u=(6, 4, 1), b=(6,), slopes=(6, 1)) | _BN
    sequence = {"x": (2, 4, 15)}
    convolution = node("Conv", "x w b", "c", group=2, strides=[2], dilations=[2], pads=[3, 1])
    ends = " permute_dims permute_dims reshape reshape"

    def following(operators: str, *nodes: Any) -> Case:
        return Case(nodes[0].op_type.lower(), onnx_model([convolution, *nodes], weights, sequence), operators)

    return [
        following("add conv2d mean permute_dims reshape reshape", node("ReduceMean", "c", "y", axes=[-1], keepdims=0)),
        following(
            "add add add clip conv2d conv2d conv2d" + ends,
            node("PRelu", "c slopes", "p"),
            node("BatchNormalization", f"p {_BN_INPUTS}", "y"),
        ),
        following("add conv2d conv2d nn.relu" + ends, node("Relu", "c", "r"), node("Conv", "r v", "y", group=6)),
        following("add conv2d" + ends, node("BatchNormalization", f"c {_BN_INPUTS}", "y")),
        following(
            "add concat conv2d nn.avg_pool2d nn.max_pool2d" + ends,
            node("MaxPool", "c", "m", kernel_shape=[3], strides=[2], pads=[1, 0]),
            node("AveragePool", "c", "a", kernel_shape=[3], strides=[2], pads=[1, 0]),
            node("Concat", "m a", "y", axis=1),
        ),
        following("add conv2d mean permute_dims reshape reshape", node("GlobalAveragePool", "c", "y")),
        Case(
            "residual_of_sequences",
            onnx_model(
                [node("Conv", "x u", "c"), node("Conv", "x u b", "d"), node("Add", "c d", "y")], weights, sequence
            ),
            "add add conv2d conv2d" + ends,
        ),
    ]


def movement_cases() -> list[Case]:
    conv = node("Conv", "x w b", "c", pads=[1, 1, 1, 1])
    shapes = _numbers(five=[1, 2, 3, 8, 8], four=[1, 6, 8, 8], rows=[1, -1])
    shuffle = [
        node("Reshape", "c five", "g"),
        node("Transpose", "g", "t", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "t four", "y"),
    ]
    slices = _numbers(b1=[1], e1=[7], a2=[2], b2=[0], e2=[100], s2=[2], ac=[1], bc=[1], ec=[-1])
    sliced = [
        node("Slice", "c b1 e1 a2", "d"),
        node("Slice", "d b2 e2 a2 s2", "e"),
        node("Slice", "e bc ec ac", "y"),
    ]
    dense = random_weights(7, fw=(6 * 8 * 8, 5), fb=(5,))
    last = random_weights(8, lw=(6, 4, 1, 1))
    return [
        Case("channel_shuffle", onnx_model([conv, *shuffle], CONV | shapes), "add conv2d take" + ENDS),
        Case("slices", onnx_model([conv, *sliced], CONV | slices), "add conv2d strided_slice" + ENDS),
        Case(
            "split",
            onnx_model([conv, node("Split", "c", "l r", axis=1), node("Mul", "l r", "y")], CONV),
            "add conv2d multiply strided_slice strided_slice" + ENDS,
        ),
        Case(
            "flatten_then_dense",
            onnx_model([conv, node("Flatten", "c", "f"), node("Gemm", "f fw fb", "y")], CONV | dense),
            "add add conv2d matmul permute_dims reshape",
        ),
        Case(
            "flatten_for_two",
            onnx_model(
                [conv, node("Flatten", "c", "f"), node("Gemm", "f fw fb", "g"), node("Softmax", "f", "z", axis=1)],
                CONV | dense,
                outputs="g z",
            ),
            "Tuple add add conv2d matmul nn.softmax permute_dims permute_dims reshape",
        ),
        Case(
            "channels_last_model",
            onnx_model(
                [
                    node("Transpose", "x", "t", perm=[0, 3, 1, 2]),
                    node("Conv", "t lw", "c"),
                    node("Transpose", "c", "y", perm=[0, 2, 3, 1]),
                ],
                last,
                {"x": (1, 8, 8, 4)},
            ),
            "conv2d",
        ),
        Case(
            "squeeze_and_unsqueeze",
            onnx_model(
                [node("GlobalAveragePool", "x", "m"), node("Squeeze", "m a", "s"), node("Unsqueeze", "s a", "y")],
                _numbers(a=[2, 3]),
            ),
            "mean permute_dims reshape",
        ),
    ]


def constant_cases() -> list[Case]:
    weights = random_weights(14, p=(8, 5), q=(5, 8), t=(8,))
    hidden = [
        node("MatMul", "p q", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r p", "o"),
        node("MatMul", "o q", "s"),
    ]
    gates = [node("Sigmoid", "s", "g"), node("Tanh", "g", "k"), node("Clip", "k lo hi", "c"), node("Add", "c t", "a")]
    return [
        Case(
            "network_of_weights_alone",
            onnx_model(
                [*hidden, *gates, node("Add", "x a", "y")], weights | {"lo": np.float32(0.1), "hi": np.float32(0.6)}
            ),
            "add",
        ),
        Case(
            "reduced_weights",
            onnx_model([node("ReduceSumSquare", "p", "n", axes=[1], keepdims=0), node("Add", "x n", "y")], weights),
            "add",
        ),
    ]


def all_cases() -> list[Case]:
    return [
        *clip_cases(),
        *affine_cases(),
        *matmul_cases(),
        *padding_cases(),
        *pooling_cases(),
        *sequence_cases(),
        *movement_cases(),
        *constant_cases(),
    ]
