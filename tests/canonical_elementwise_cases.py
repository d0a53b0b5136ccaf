"""Small ONNX models of activations, sums, concatenations and resizing, as in :mod:`tests.canonical_cases`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.canonical_cases import CONV, ENDS, Case
from tests.onnx_models import node, onnx_model, random_weights


def elementwise_cases() -> list[Case]:
    conv = node("Conv", "x w b", "c", pads=[1, 1, 1, 1])
    both = [node("Conv", "x w b", "c"), node("Conv", "x v", "d")]
    weights = CONV | random_weights(9, v=(6, 4, 3, 3))
    slope = random_weights(10, slope=(6, 1, 1))

    def unary(operator: str, operators: str, opset: int = 14, **attributes: Any) -> Case:
        model = onnx_model([conv, node(operator, "c", "y", **attributes)], CONV, opset=opset)
        return Case(operator.lower(), model, operators + ENDS)

    return [
        unary("LeakyRelu", "add conv2d nn.leakyrelu", alpha=0.1),
        unary("Sigmoid", "add conv2d sigmoid"),
        unary("HardSigmoid", "add clip conv2d"),
        unary("HardSwish", "add add clip conv2d divide multiply"),
        unary("Dropout", "add conv2d"),
        unary("Identity", "add conv2d"),
        Case(
            "silu",
            onnx_model([conv, node("Sigmoid", "c", "s"), node("Mul", "s c", "y")], CONV),
            "add conv2d nn.silu" + ENDS,
        ),
        Case(
            "prelu",
            onnx_model([conv, node("PRelu", "c slope", "y")], CONV | slope),
            "add add clip conv2d conv2d" + ENDS,
        ),
        Case(
            "prelu_of_one_slope",
            onnx_model([conv, node("PRelu", "c slope", "y")], CONV | {"slope": np.float32([0.25])}),
            "add conv2d nn.prelu" + ENDS,
        ),
        Case(
            "sum_of_three",
            onnx_model([*both, node("Sum", "c d c", "y")], weights),
            "add add add conv2d conv2d" + ENDS,
        ),
        Case("max_of_two", onnx_model([*both, node("Max", "c d", "y")], weights), "add conv2d conv2d maximum" + ENDS),
        Case(
            "mean_of_two",
            onnx_model([*both, node("Mean", "c d", "y")], weights),
            "add add conv2d conv2d multiply" + ENDS,
        ),
        Case(
            "concat_channels",
            onnx_model([*both, node("Concat", "c d c", "y", axis=1)], weights),
            "add concat conv2d conv2d" + ENDS,
        ),
        Case(
            "clamp_after_concat",
            onnx_model(
                [
                    node("Relu", "x", "r"),
                    node("AveragePool", "r", "p", kernel_shape=[3, 3]),
                    node("Conv", "x w b", "c"),
                    node("Concat", "p c", "j", axis=1),
                    node("Relu", "j", "y"),
                ],
                CONV,
            ),
            "add concat conv2d nn.avg_pool2d nn.relu nn.relu permute_dims" + ENDS,
        ),
        Case(
            "clamp_after_concat_that_no_layer_absorbs",
            onnx_model(
                [*both, node("Tanh", "c", "t"), node("Concat", "t d", "j", axis=1), node("Relu", "j", "y")], weights
            ),
            "add concat conv2d conv2d nn.relu tanh" + ENDS,
        ),
        Case(
            "clamp_of_clamped",
            onnx_model(
                [node("Relu", "x", "r"), node("MaxPool", "r", "p", kernel_shape=[2, 2]), node("Relu", "p", "y")]
            ),
            "nn.max_pool2d nn.relu" + ENDS,
        ),
        Case(
            "resize_to_nearest",
            onnx_model(
                [conv, node("Resize", "c - - sizes", "y", mode="nearest", coordinate_transformation_mode="half_pixel")],
                CONV | {"sizes": np.array([1, 6, 11, 5])},
            ),
            "add conv2d take take" + ENDS,
        ),
        Case(
            "resize_linear",
            onnx_model(
                [
                    conv,
                    node("Resize", "c - - sizes", "y", mode="linear", coordinate_transformation_mode="align_corners"),
                ],
                CONV | {"sizes": np.array([1, 6, 11, 5])},
            ),
            "add conv2d image.resize2d" + ENDS,
        ),
        Case(
            "softmax_over_channels",
            onnx_model([conv, node("Softmax", "c", "y", axis=1)], CONV),
            "add conv2d nn.softmax" + ENDS,
        ),
        Case(
            "gate_by_channel",
            onnx_model([conv, node("GlobalAveragePool", "c", "g"), node("Mul", "c g", "y")], CONV),
            "add conv2d mean multiply" + ENDS,
        ),
        Case(
            "grouped_conv",
            onnx_model([node("Conv", "x g", "y", group=2, dilations=[2, 2])], random_weights(g=(6, 2, 2, 2))),
            "conv2d" + ENDS,
        ),
    ]
