"""Layers of a model as plain records, so that an artifact can be checked without the model it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.layers import GraphTensor, Layer, LayerGraph
from tvm_hquant.operator_codec import from_jsonable, to_jsonable

Array = npt.NDArray[Any]


def graph_record(graph: LayerGraph) -> dict[str, Any]:
    """Everything of a graph but the values of its weights."""
    return {
        "inputs": [{"name": n, "shape": list(t.shape), "dtype": t.dtype} for n, t in graph.inputs.items()],
        "layers": [
            {
                "name": layer.name,
                "function": layer.function_name,
                "operator": to_jsonable(layer.operator),
                "inputs": list(layer.inputs),
            }
            for layer in graph.layers
        ],
        "outputs": list(graph.outputs),
        "output_names": list(graph.output_names),
    }


def save_weights(path: Path, graph: LayerGraph, names: Sequence[str]) -> None:
    """Writes float weights and biases of the named layers, also of layers that are no convolutions."""
    arrays: dict[str, Array] = {}
    for name in names:
        layer = graph.by_name[name]
        if layer.weights is not None:
            arrays[f"{name}/weights"] = layer.weights
        if layer.bias is not None:
            arrays[f"{name}/bias"] = layer.bias
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def graph_from_record(record: Mapping[str, Any], weights: Mapping[str, Array]) -> LayerGraph:
    """The graph again. Layers whose weights were not saved have None: their codes are in the plan."""
    layers = []
    for entry in record["layers"]:
        operator = from_jsonable(entry["operator"])
        values, bias = weights.get(f"{entry['name']}/weights"), weights.get(f"{entry['name']}/bias")
        layers.append(Layer(entry["name"], entry["function"], operator, tuple(entry["inputs"]), values, bias))
    inputs = {e["name"]: GraphTensor(tuple(e["shape"]), e["dtype"]) for e in record["inputs"]}
    return LayerGraph(inputs, tuple(layers), tuple(record["outputs"]), tuple(record["output_names"]))
