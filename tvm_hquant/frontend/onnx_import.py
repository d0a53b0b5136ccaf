"""ONNX to Relax, by TVM's importer (``tvm.relax.frontend.onnx``), with weights that keep their names."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
from tvm import IRModule
from tvm.relax.frontend.onnx import from_onnx

from tvm_hquant.errors import ModelError
from tvm_hquant.frontend.onnx_einsum import spell_einsum
from tvm_hquant.frontend.onnx_file import (
    check_output_shapes,
    check_sizes,
    check_structure,
    model_inputs,
    node_label,
    read_onnx,
)
from tvm_hquant.frontend.onnx_folding import fold_shape_computations
from tvm_hquant.frontend.onnx_pads import spell_repeating_pads
from tvm_hquant.frontend.onnx_shapes import fixed_input_shapes, with_fixed_inputs
from tvm_hquant.frontend.relax_import import check_static
from tvm_hquant.layers import INPUTS_ATTRIBUTE, OUTPUTS_ATTRIBUTE


def import_onnx(
    model: str | os.PathLike[str] | Any,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    batch: int = 1,
) -> IRModule:
    """The Relax module of an ONNX model, in the form that :mod:`tvm_hquant.frontend` describes.

    Args:
        model: path of the file, or an ``onnx.ModelProto`` (which is not changed).
        input_shapes: shapes of inputs by name, for dimensions that the file leaves open.
        batch: the first dimension of every input that leaves it open and is not in ``input_shapes``.

    Raises:
        ModelError: the file is missing or damaged, a shape is open or contradicts the file, or the model holds what cannot
            be imported: opset below 9, control flow, recurrent and quantized operators, outputs whose size depends on
            values, operators without an importer.
    """
    proto, label = read_onnx(model)
    shapes = fixed_input_shapes(proto, label, input_shapes, batch)
    with_fixed_inputs(proto, shapes)
    check_structure(proto, label)
    check_output_shapes(proto, label)
    fold_shape_computations(proto)
    check_sizes(proto, label)
    spell_repeating_pads(proto)
    spell_einsum(proto)
    _sort_weights_from_constants(proto.graph)
    inputs = [i.name for i in model_inputs(proto.graph)]
    outputs = [o.name for o in proto.graph.output]
    mod = _imported(proto, label)
    main = mod["main"].with_attrs({INPUTS_ATTRIBUTE: inputs, OUTPUTS_ATTRIBUTE: outputs})
    named = IRModule({**dict(mod.functions_items()), mod.get_global_var("main"): main}, attrs=mod.attrs)
    check_static(named, label)
    return named


def _imported(proto: Any, label: str) -> IRModule:
    printed = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            # The model has been checked, with errors instead of these warnings.
            warnings.simplefilter("ignore")
            return from_onnx(proto, keep_params_in_input=True)
    except Exception as error:
        # The importer raises whatever its converters and type inference raise; it prints the operator it was at.
        raise ModelError(f"{label}: {_refused(proto.graph, printed.getvalue(), str(error))}") from error


def _refused(graph: Any, printed: str, reason: str) -> str:
    """What the importer stumbled over."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    why = lines[-1] if lines else "no reason given"
    at = re.search(r"Error converting operator (\w+)", printed)
    if at is not None:
        nodes = [node_label(n) for n in graph.node if n.op_type == at.group(1)]
        named = ", ".join(nodes[:3]) + (" …" if len(nodes) > 3 else "")
        return f"TVM cannot import operator {at.group(1)} as it is used here (nodes {named}): {why}"
    missing = [n for n in graph.node if re.search(rf"not supported for frontend ONNX:.*\b{n.op_type}\b", reason)]
    if missing:
        node = missing[0]
        domain = node.domain or "ai.onnx"
        return (
            f"operator {node.op_type} (node {node_label(node)}, domain {domain}) has no importer in this TVM: "
            "export the model without it"
        )
    return f"TVM's importer refused the model: {why}"


def _sort_weights_from_constants(graph: Any) -> None:
    """Float tensors become initializers under their names, all other constants become ``Constant`` nodes.

    The importer turns initializers into parameters and loses the names of other tensors. It computes shapes only from
    constants.
    """
    weights: list[Any] = []
    constants: list[Any] = []
    for tensor in graph.initializer:
        if _is_weight(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), len(tensor.dims)):
            weights.append(tensor)
        else:
            constants.append(onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    known = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        values = _constant_values(node, known)
        if values is not None and _is_weight(values.dtype, values.ndim):
            weights.append(onnx.numpy_helper.from_array(values, node.output[0]))
        elif values is not None:
            tensor = onnx.numpy_helper.from_array(values, node.output[0])
            known[node.output[0]] = tensor
            constants.append(onnx.helper.make_node("Constant", [], [node.output[0]], value=tensor))
        else:
            nodes.append(node)
    ordered = [*constants, *nodes]
    del graph.node[:]
    graph.node.extend(ordered)
    kept = list(weights)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _is_weight(dtype: Any, rank: int) -> bool:
    return np.dtype(dtype) == np.float32 and rank > 0


def _constant_values(node: Any, known: Mapping[str, Any]) -> Any | None:
    """The value of a ``Constant`` node, or of a ``ConstantOfShape`` node whose shape is known."""
    attributes = {a.name: a for a in node.attribute}
    if node.op_type == "Constant":
        if "value" in attributes:
            return onnx.numpy_helper.to_array(attributes["value"].t)
        if "value_float" in attributes:
            return np.asarray(attributes["value_float"].f, np.float32)
        if "value_floats" in attributes:
            return np.asarray(attributes["value_floats"].floats, np.float32)
        if "value_int" in attributes:
            return np.asarray(attributes["value_int"].i, np.int64)
        if "value_ints" in attributes:
            return np.asarray(attributes["value_ints"].ints, np.int64)
        return None
    if node.op_type == "ConstantOfShape" and node.input[0] in known:
        shape = onnx.numpy_helper.to_array(known[node.input[0]])
        fill = onnx.numpy_helper.to_array(attributes["value"].t) if "value" in attributes else np.zeros(1, np.float32)
        return np.full(tuple(int(s) for s in shape), fill.reshape(()), fill.dtype)
    return None
