"""Small ONNX models from a few lines, what ONNX Runtime makes of a model, and where the trained networks are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
from onnx import helper

Array = npt.NDArray[Any]
Dimension = int | str


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node; names are separated by blanks, ``-`` stands for an input that is left out."""
    named = ["" if n == "-" else n for n in inputs.split()]
    return helper.make_node(operator, named, outputs.split(), name=f"node_{outputs.split()[0]}", **attributes)


def onnx_model(
    nodes: Sequence[Any],
    weights: Mapping[str, Array] | None = None,
    inputs: Mapping[str, Sequence[Dimension]] | None = None,
    outputs: str = "y",
    opset: int = 13,
    dtype: int = onnx.TensorProto.FLOAT,
) -> Any:
    """A model with one input ``x`` of shape [1, 4, 8, 8] unless said otherwise."""
    shapes = inputs or {"x": (1, 4, 8, 8)}
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, dtype, list(shape)) for name, shape in shapes.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs.split()],
        [onnx.numpy_helper.from_array(np.asarray(values), name) for name, values in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def random_weights(seed: int = 0, **shapes: Sequence[int]) -> dict[str, Array]:
    """Normally distributed float32 weights; those whose name ends in ``variance`` are positive."""
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    return {n: np.abs(v) + np.float32(0.1) if n.endswith("variance") else v for n, v in values.items()}


def random_inputs(model: Any, seed: int = 1, batch: int = 1) -> dict[str, Array]:
    """Normally distributed inputs, zeros and ones where they are integers; open dimensions get the size ``batch``."""
    rng = np.random.default_rng(seed)
    initializers = {i.name for i in model.graph.initializer}
    inputs = {}
    for value in model.graph.input:
        if value.name not in initializers:
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
            values = rng.normal(size=shape) if np.issubdtype(dtype, np.floating) else rng.integers(0, 2, shape)
            inputs[value.name] = values.astype(dtype)
    return inputs


def onnxruntime_outputs(model: Any, inputs: Mapping[str, Array]) -> list[Array]:
    """All outputs of a model under ONNX Runtime on one thread, without its graph optimizations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(o) for o in session.run(None, dict(inputs))]


def zoo_model(name: str) -> Path:
    """The file of a trained network; the test is skipped where the folder is missing."""
    default = Path(__file__).resolve().parents[2] / "shared" / "zoo"
    path = Path(os.environ.get("HQUANT_ZOO", str(default))) / "models" / f"{name}.onnx"
    if not path.exists():
        pytest.skip(f"{path} is missing: set HQUANT_ZOO to the folder of trained networks")
    return path
