"""Folds what an ONNX graph computes from shapes and numbers alone.

Exporters write sizes as arithmetic: a channel split is a ``Shape``, a ``Gather``, a division and a ``Slice`` with computed
ends, the widths of a padding are a ``Concat``, a ``Reshape`` and a ``Transpose``, and a mask of attention is a map of zeros
into which ``ScatterND`` writes. Once the inputs have fixed shapes all of that is constant, and TVM's importer, which would
make dynamic operators of some of it, gets plain numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import onnx.shape_inference
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]

_LARGEST = 4096
"""Elements of a value in the file that still is a shape or a list of indices, not a weight."""
_LARGEST_COMPUTED = 2**22
"""Elements of a value that is computed and kept."""
_NOT_FOLDED = ("Constant", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial")


def fold_shape_computations(model: Any) -> None:
    """Replaces nodes whose values follow from static shapes and numbers by ``Constant`` nodes, in a model proto of our own.

    What the file gives counts where it is at most 4096 integers or truth values, or a lone float; what is computed of that
    counts whatever it is. Tensors of floats are weights, which keep their names. Inputs must have their shapes.
    """
    graph = model.graph
    known = _small_constants(graph)
    while True:
        shapes = static_shapes(model) if any(node.op_type == "Shape" for node in graph.node) else {}
        folded = False
        for index, node in enumerate(graph.node):
            value = _value(node, known, shapes, model.opset_import)
            if value is None:
                continue
            known[node.output[0]] = value
            tensor = onnx.numpy_helper.from_array(value, node.output[0])
            graph.node[index].CopyFrom(onnx.helper.make_node("Constant", [], [node.output[0]], value=tensor))
            folded = True
        # What has been folded may be the sizes of further tensors.
        if not folded or not shapes:
            return


def static_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors for which ONNX's inference finds a static one. Weights are left out of its sight."""
    sketch = onnx.ModelProto()
    sketch.CopyFrom(model)
    del sketch.graph.initializer[:]
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims)) <= _LARGEST:
            sketch.graph.initializer.append(tensor)
        else:
            sketch.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inferred = onnx.shape_inference.infer_shapes(sketch, data_prop=True)
    shapes: dict[str, tuple[int, ...]] = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info):
        tensor_type = value.type.tensor_type
        if tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in tensor_type.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor_type.shape.dim)
    return shapes


def _small_constants(graph: Any) -> dict[str, Array]:
    tensors = [t for t in graph.initializer if int(np.prod(t.dims)) <= _LARGEST]
    known = {t.name: onnx.numpy_helper.to_array(t) for t in tensors}
    return {name: value for name, value in known.items() if _is_index(value)}


def _is_index(value: Array) -> bool:
    return value.size <= _LARGEST and (value.dtype.kind in "iub" or value.ndim == 0)


def _value(node: Any, known: dict[str, Array], shapes: Mapping[str, tuple[int, ...]], opsets: Any) -> Array | None:
    """What a node computes, or None where that is not known or no value of this kind."""
    if node.op_type == "Constant":
        if node.output[0] in known:
            return None
        value = ReferenceEvaluator(_alone(node, opsets)).run(None, {})[0]
        if _is_index(np.asarray(value)):
            known[node.output[0]] = np.asarray(value)
        return None
    if len(node.output) != 1 or node.op_type in _NOT_FOLDED:
        return None
    if node.op_type == "Shape":
        if node.input[0] not in shapes:
            return None
        bounds = {a.name: a.i for a in node.attribute}
        return np.array(shapes[node.input[0]][bounds.get("start", 0) : bounds.get("end")], np.int64)
    if not node.input or any(name and name not in known for name in node.input):
        return None
    value = np.asarray(ReferenceEvaluator(_alone(node, opsets)).run(None, {i: known[i] for i in node.input if i})[0])
    return value if value.size <= _LARGEST_COMPUTED else None


def _alone(node: Any, opsets: Any) -> Any:
    """A model of one node."""
    inputs = [onnx.helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(node.input) if name]
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = onnx.helper.make_graph([node], "alone", inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=list(opsets))
