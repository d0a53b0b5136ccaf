"""Trains the network of ``hquant quickstart`` and writes its ONNX file and data, with NumPy alone.

The network is a small MobileNetV2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381) for scikit-learn's
handwritten digits, 8×8 pixels, 10 classes: a 3×3 stem, inverted residual blocks (1×1 expansion, 3×3 depthwise, 1×1
linear projection; a residual add where shapes agree), batch normalization, ReLU6, global average pool, dense layer.
Training is Adam with a cosine learning rate on training images shifted by up to one pixel.

Evaluation images are never trained on; calibration images are training images. Everything is drawn from one seed, so
the same NumPy on the same kind of CPU writes the same bytes (another BLAS may round sums differently).

    python benchmarks/train_quickstart_model.py                        # into tvm_hquant/quickstart, about half a minute
    python benchmarks/train_quickstart_model.py --output /tmp/folder
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Parameters = dict[str, Array]

CLASSES = 10
BATCH_NORM_EPSILON = 1e-5
CALIBRATION_SAMPLES = 256
EVALUATION_FRACTION = 0.3


@dataclass(frozen=True)
class Unit:
    """A convolution without bias, batch normalization, and ReLU6 if ``activation``.

    Weights are [kernel, kernel, inputs, outputs], or [kernel, kernel, inputs] if ``depthwise``.
    """

    name: str
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    depthwise: bool = False
    activation: bool = True

    @property
    def padding(self) -> int:
        return self.kernel // 2


@dataclass(frozen=True)
class Block:
    """Units in a row; ``residual`` adds the block's input to the output of the last."""

    name: str
    units: tuple[Unit, ...]
    residual: bool = False


def inverted_residual(name: str, inputs: int, outputs: int, expansion: int, stride: int = 1) -> Block:
    wide = inputs * expansion
    return Block(
        name,
        (
            Unit(f"{name}.expand", inputs, wide),
            Unit(f"{name}.depthwise", wide, wide, kernel=3, stride=stride, depthwise=True),
            Unit(f"{name}.project", wide, outputs, activation=False),
        ),
        residual=stride == 1 and inputs == outputs,
    )


NETWORK = (
    Block("stem", (Unit("stem", 1, 16, kernel=3),)),
    inverted_residual("block1", 16, 16, expansion=3),
    inverted_residual("block2", 16, 24, expansion=3, stride=2),
    inverted_residual("block3", 24, 24, expansion=3),
    Block("head", (Unit("head", 24, 64),)),
)
FEATURES = 64


# Forward and backward, channels last -------------------------------------------------------------------------------


def taps(unit: Unit, height: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Position in the kernel, and the rows and columns of the padded input that it meets. Images are square."""
    reach = (height + 2 * unit.padding - unit.kernel) // unit.stride * unit.stride + 1
    for i in range(unit.kernel):
        for j in range(unit.kernel):
            yield i, j, slice(i, i + reach, unit.stride), slice(j, j + reach, unit.stride)


def convolve(unit: Unit, x: Array, weight: Array) -> tuple[Array, Array]:
    """The convolution of ``x`` [n, h, w, c], and the padded input, which the backward step needs."""
    p = unit.padding
    padded = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0))) if p else x
    parts = (
        padded[:, rows, columns] * weight[i, j] if unit.depthwise else padded[:, rows, columns] @ weight[i, j]
        for i, j, rows, columns in taps(unit, x.shape[1])
    )
    total = next(parts)
    for part in parts:
        total += part
    return total, padded


def convolve_backward(unit: Unit, padded: Array, weight: Array, gradient: Array) -> tuple[Array, Array]:
    """Gradients of the input and of the weights."""
    p = unit.padding
    height = padded.shape[1] - 2 * p
    padded_gradient = np.zeros_like(padded)
    weight_gradient = np.zeros_like(weight)
    for i, j, rows, columns in taps(unit, height):
        window = padded[:, rows, columns]
        if unit.depthwise:
            weight_gradient[i, j] = np.einsum("nhwc,nhwc->c", window, gradient)
            padded_gradient[:, rows, columns] += gradient * weight[i, j]
        else:
            flat = gradient.reshape(-1, unit.outputs)
            weight_gradient[i, j] = np.ascontiguousarray(window).reshape(-1, unit.inputs).T @ flat
            padded_gradient[:, rows, columns] += gradient @ weight[i, j].T
    return padded_gradient[:, p : p + height, p : p + height], weight_gradient


@dataclass(frozen=True)
class Saved:
    """What a unit's backward step needs of its forward step."""

    padded: Array
    normalized: Array
    deviation: Array
    passes: npt.NDArray[np.bool_] | None


def unit_forward(unit: Unit, parameters: Parameters, x: Array) -> tuple[Array, Saved, tuple[Array, Array]]:
    """Output, saved values, and mean and variance of each channel over the batch."""
    y, padded = convolve(unit, x, parameters[f"{unit.name}.weight"])
    mean = y.mean(axis=(0, 1, 2))
    variance = y.var(axis=(0, 1, 2))
    deviation = np.sqrt(variance + np.float32(BATCH_NORM_EPSILON))
    normalized = (y - mean) / deviation
    y = normalized * parameters[f"{unit.name}.scale"] + parameters[f"{unit.name}.shift"]
    passes = None
    if unit.activation:
        passes = (y > 0) & (y < 6)
        y = np.clip(y, 0, 6)
    return y, Saved(padded, normalized, deviation, passes), (mean, variance)


def unit_backward(unit: Unit, parameters: Parameters, saved: Saved, gradient: Array) -> tuple[Array, Parameters]:
    """Gradients of the input and of the unit's parameters."""
    if saved.passes is not None:
        gradient = gradient * saved.passes
    axes = (0, 1, 2)
    shift_gradient = gradient.sum(axis=axes)
    scale_gradient = (gradient * saved.normalized).sum(axis=axes)
    count = np.float32(math.prod(gradient.shape[:3]))
    centered = gradient - (shift_gradient + saved.normalized * scale_gradient) / count
    gradient = centered * (parameters[f"{unit.name}.scale"] / saved.deviation)
    gradient, weight_gradient = convolve_backward(unit, saved.padded, parameters[f"{unit.name}.weight"], gradient)
    return gradient, {
        f"{unit.name}.weight": weight_gradient,
        f"{unit.name}.scale": scale_gradient,
        f"{unit.name}.shift": shift_gradient,
    }


def loss_gradients(parameters: Parameters, x: Array, labels: Labels) -> tuple[float, Parameters, Parameters]:
    """Cross entropy, its gradients, and the batch's statistics as ``<unit>.mean`` and ``<unit>.variance``."""
    saved: dict[str, Saved] = {}
    statistics: Parameters = {}
    for block in NETWORK:
        start = x
        for unit in block.units:
            x, saved[unit.name], (mean, variance) = unit_forward(unit, parameters, x)
            statistics |= {f"{unit.name}.mean": mean, f"{unit.name}.variance": variance}
        x = x + start if block.residual else x
    features = x.mean(axis=(1, 2))
    logits = features @ parameters["classifier.weight"] + parameters["classifier.bias"]
    logits -= logits.max(axis=1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -float(np.log(probabilities[rows, labels]).mean())

    error = probabilities.copy()
    error[rows, labels] -= 1
    error /= np.float32(len(labels))
    gradients = {"classifier.weight": features.T @ error, "classifier.bias": error.sum(axis=0)}
    area = x.shape[1] * x.shape[2]
    pooled = (error @ parameters["classifier.weight"].T / np.float32(area))[:, None, None]
    gradient = np.broadcast_to(pooled, x.shape)
    for block in reversed(NETWORK):
        end = gradient
        for unit in reversed(block.units):
            gradient, found = unit_backward(unit, parameters, saved[unit.name], gradient)
            gradients |= found
        gradient = gradient + end if block.residual else gradient
    return loss, gradients, statistics


# Training ----------------------------------------------------------------------------------------------------------


def initial_parameters(random: np.random.Generator) -> Parameters:
    """He et al. 2015 (https://arxiv.org/abs/1502.01852) for convolutions, zeros for biases."""
    parameters: Parameters = {}
    for unit in (unit for block in NETWORK for unit in block.units):
        size = (unit.kernel, unit.kernel, unit.inputs) + (() if unit.depthwise else (unit.outputs,))
        fan_in = unit.kernel**2 * (1 if unit.depthwise else unit.inputs)
        parameters[f"{unit.name}.weight"] = random.normal(0, math.sqrt(2 / fan_in), size).astype(np.float32)
        parameters[f"{unit.name}.scale"] = np.ones(unit.outputs, np.float32)
        parameters[f"{unit.name}.shift"] = np.zeros(unit.outputs, np.float32)
    bound = math.sqrt(1 / FEATURES)
    parameters["classifier.weight"] = random.uniform(-bound, bound, (FEATURES, CLASSES)).astype(np.float32)
    parameters["classifier.bias"] = np.zeros(CLASSES, np.float32)
    return parameters


def shifted(images: Array, random: np.random.Generator) -> Array:
    """Each image moved by -1, 0 or 1 pixel along each axis, zeros moving in."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    offsets = random.integers(0, 3, (len(images), 2))
    size = images.shape[1]
    return np.stack([p[i : i + size, j : j + size] for p, (i, j) in zip(padded, offsets, strict=True)])


def train(images: Array, labels: Labels, epochs: int, random: np.random.Generator) -> Parameters:
    """Trained parameters, with the running ``<unit>.mean`` and ``<unit>.variance`` of batch normalization.

    Adam as in Kingma and Ba 2015 (https://arxiv.org/abs/1412.6980), weight decay apart from it, as in AdamW.
    """
    batch, top_rate, decay = 64, 4e-3, 1e-2
    steps_per_epoch = len(images) // batch
    steps = epochs * steps_per_epoch
    parameters = initial_parameters(random)
    first = {name: np.zeros_like(value) for name, value in parameters.items()}
    second = {name: np.zeros_like(value) for name, value in parameters.items()}
    running: Parameters = {}
    step = 0
    for epoch in range(epochs):
        order = random.permutation(len(images))
        losses = []
        for chosen in np.array_split(order[: steps_per_epoch * batch], steps_per_epoch):
            loss, gradients, statistics = loss_gradients(parameters, shifted(images[chosen], random), labels[chosen])
            losses.append(loss)
            running = {
                name: np.float32(0.9) * running.get(name, value) + np.float32(0.1) * value
                for name, value in statistics.items()
            }
            step += 1
            rate = top_rate * (1 + math.cos(math.pi * step / steps)) / 2
            for name, gradient in gradients.items():
                first[name] = np.float32(0.9) * first[name] + np.float32(0.1) * gradient
                second[name] = np.float32(0.999) * second[name] + np.float32(0.001) * gradient**2
                direction = first[name] / np.float32(1 - 0.9**step)
                direction = direction / (np.sqrt(second[name] / np.float32(1 - 0.999**step)) + np.float32(1e-8))
                if name.endswith(".weight"):
                    direction = direction + np.float32(decay) * parameters[name]
                parameters[name] = parameters[name] - np.float32(rate) * direction
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:3d}: loss {np.mean(losses):.4f}", flush=True)
    return parameters | running


# Export ------------------------------------------------------------------------------------------------------------


def export(parameters: Parameters) -> onnx.ModelProto:
    """The network as ONNX, opset 13: ``input`` [N, 1, 8, 8] to ``logits`` [N, 10], float32."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []

    def constant(name: str, value: npt.ArrayLike) -> str:
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))
        return name

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output.replace(".", "_"), **attributes))
        return output

    lowest, highest = constant("relu6.min", 0.0), constant("relu6.max", 6.0)
    value = "input"
    for block in NETWORK:
        start = value
        for unit in block.units:
            weight = parameters[f"{unit.name}.weight"]
            weight = weight[..., None].transpose(2, 3, 0, 1) if unit.depthwise else weight.transpose(3, 2, 0, 1)
            value = node(
                "Conv",
                [value, constant(f"{unit.name}.weight", weight)],
                f"{unit.name}.conv",
                kernel_shape=[unit.kernel] * 2,
                strides=[unit.stride] * 2,
                pads=[unit.padding] * 4,
                group=unit.inputs if unit.depthwise else 1,
            )
            names = ("scale", "shift", "mean", "variance")
            normalization = [constant(f"{unit.name}.{n}", parameters[f"{unit.name}.{n}"]) for n in names]
            value = node("BatchNormalization", [value, *normalization], f"{unit.name}.norm", epsilon=BATCH_NORM_EPSILON)
            if unit.activation:
                value = node("Clip", [value, lowest, highest], f"{unit.name}.relu6")
        if block.residual:
            value = node("Add", [value, start], f"{block.name}.add")
    value = node("Flatten", [node("GlobalAveragePool", [value], "pool")], "features")
    weight_name = constant("classifier.weight", parameters["classifier.weight"].T)
    node("Gemm", [value, weight_name, constant("classifier.bias", parameters["classifier.bias"])], "logits", transB=1)

    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        tensors,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7, producer_name="tvm_hquant quickstart"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: onnx.ModelProto, images: Array, labels: Labels) -> float:
    """Fraction of right answers of the exported model under ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": images})
    return float((logits.argmax(axis=1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the network of 'hquant quickstart'.")
    folder = Path(__file__).resolve().parent.parent / "tvm_hquant" / "quickstart"
    parser.add_argument("--output", type=Path, default=folder, help="folder for the files")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    random = np.random.default_rng(options.seed)
    order = random.permutation(len(images))
    held_out = round(len(images) * EVALUATION_FRACTION)
    evaluation, training = order[:held_out], order[held_out:]

    parameters = train(images[training].transpose(0, 2, 3, 1), labels[training], options.epochs, random)
    model = export(parameters)
    calibration = training[:CALIBRATION_SAMPLES]
    options.output.mkdir(parents=True, exist_ok=True)
    onnx.save(model, options.output / "digits.onnx")
    for name, chosen in (("calibration", calibration), ("evaluation", evaluation)):
        path = options.output / f"digits-{name}.npz"
        np.savez_compressed(path, input=images[chosen], labels=labels[chosen])
    print(f"training accuracy   {accuracy(model, images[training], labels[training]):.4f} of {len(training)} images")
    print(f"evaluation accuracy {accuracy(model, images[evaluation], labels[evaluation]):.4f} of {held_out} images")


if __name__ == "__main__":
    main()
