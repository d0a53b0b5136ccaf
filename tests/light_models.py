"""The nine "light" networks inside the installed onnx package, with random weights in place of their placeholders.

They are the real graphs of AlexNet, DenseNet-121, Inception v1 and v2, ResNet-50, ShuffleNet v1, SqueezeNet, VGG-19 and
ZFNet-512, but most weights are made by ``ConstantOfShape``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper

Array = npt.NDArray[Any]


def light_model_path(name: str) -> Path:
    """The file of a network: ``densenet121``, ``shufflenet``…"""
    return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{name}.onnx"


def load_random_weights(model: Any, seed: int) -> Any:
    """A copy of a model whose weights are random, of a size that keeps activations finite and away from zero.

    Kernels and matrices are scaled after He et al. (arXiv 1502.01852), batch norm gets statistics near (0, 1).
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = 4  # the first that lets initializers stand alone, without being graph inputs
    rng = np.random.default_rng(seed)
    shapes = _weight_shapes(copy.graph)
    values = {name: _random(role, shapes[name], rng) for name, role in _roles(copy.graph).items() if name in shapes}
    nodes = [n for n in copy.graph.node if n.op_type != "ConstantOfShape" or n.output[0] not in values]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    others = [i for i in copy.graph.initializer if i.name not in values]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(others)
    copy.graph.initializer.extend(onnx.numpy_helper.from_array(v, name) for name, v in values.items())
    return copy


def _weight_shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all initializers and of what ``ConstantOfShape`` makes from one."""
    initializers = {i.name: i for i in graph.initializer}
    shapes = {name: tuple(i.dims) for name, i in initializers.items()}
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in initializers:
            target = onnx.numpy_helper.to_array(initializers[node.input[0]])
            shapes[node.output[0]] = tuple(int(d) for d in target)
    return shapes


def _roles(graph: Any) -> dict[str, str]:
    """What each weight is used as."""
    roles: dict[str, str] = {}
    source = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Unsqueeze"}
    positions = {
        "Conv": {1: "weight", 2: "shift"},
        "Gemm": {1: "weight", 2: "shift"},
        "BatchNormalization": {1: "scale", 2: "shift", 3: "shift", 4: "scale"},
        "Mul": {1: "scale"},
        "Add": {1: "shift"},
    }
    for node in graph.node:
        for index, role in positions.get(node.op_type, {}).items():
            if index < len(node.input):
                roles[source.get(node.input[index], node.input[index])] = role
    return roles


def _random(role: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if role == "scale":
        return rng.uniform(0.7, 1.3, shape).astype(np.float32)
    if role == "shift":
        return rng.normal(0.0, 0.1, shape).astype(np.float32)
    fan_in = int(np.prod(shape[1:]))
    return (rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2.0 / fan_in))).astype(np.float32)


def without_final_softmax(model: Any) -> Any:
    """A copy that gives out the scores, which random weights make so large that softmax hides every difference."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    last = copy.graph.node[-1]
    if last.op_type == "Softmax":
        copy.graph.output[0].name = last.input[0]
        copy.graph.output[0].type.tensor_type.ClearField("shape")
        del copy.graph.node[-1]
    return copy
