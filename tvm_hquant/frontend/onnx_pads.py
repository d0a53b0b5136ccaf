"""Paddings that repeat values of the tensor become choices of its rows and columns.

TVM's importer makes loops of them that no kernel of this project computes; a choice of indices is one that moves values
unchanged, in codes too.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import onnx
import onnx.numpy_helper

from tvm_hquant.frontend.onnx_file import replace_nodes
from tvm_hquant.frontend.onnx_folding import static_shapes

_MODES = ("reflect", "edge", "wrap")


def spell_repeating_pads(model: Any) -> None:
    """Replaces ``Pad`` nodes of mode reflect, edge or wrap by a ``Gather`` on each padded axis, in a model proto of our own.

    The widths must be constant and not negative, and the shapes known: other nodes stay as they are.
    """
    graph = model.graph
    if not any(_mode(node) in _MODES for node in graph.node if node.op_type == "Pad"):
        return
    constants = {t.name: t for t in graph.initializer}
    constants |= {
        n.output[0]: n.attribute[0].t for n in graph.node if n.op_type == "Constant" and n.attribute[0].HasField("t")
    }
    shapes = static_shapes(model)
    replace_nodes(graph, lambda node: _gathers(node, constants, shapes) if node.op_type == "Pad" else None)


def _mode(node: Any) -> str:
    return next((a.s.decode() for a in node.attribute if a.name == "mode"), "constant")


def _gathers(node: Any, constants: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> list[Any] | None:
    mode, shape, widths = _mode(node), shapes.get(node.input[0]), _widths(node, constants)
    if mode not in _MODES or not shape or widths is None or min(widths) < 0:
        return None
    axes = list(range(len(shape)))
    if len(node.input) > 3 and node.input[3]:
        if node.input[3] not in constants:
            return None
        axes = [int(a) % len(shape) for a in onnx.numpy_helper.to_array(constants[node.input[3]])]
    padded = [(a, widths[i], widths[i + len(axes)]) for i, a in enumerate(axes) if widths[i] or widths[i + len(axes)]]
    if not padded:
        return None
    found, tensor = [], node.input[0]
    for number, (axis, before, after) in enumerate(padded, 1):
        indices = np.pad(np.arange(shape[axis]), (before, after), cast(Literal["reflect", "edge", "wrap"], mode))
        name = f"{node.output[0]}_rows_{axis}"
        value = onnx.numpy_helper.from_array(indices.astype(np.int64), name)
        output = node.output[0] if number == len(padded) else f"{node.output[0]}_padded_{axis}"
        found.append(onnx.helper.make_node("Constant", [], [name], value=value))
        found.append(onnx.helper.make_node("Gather", [tensor, name], [output], name=node.name, axis=axis))
        tensor = output
    return found


def _widths(node: Any, constants: dict[str, Any]) -> list[int] | None:
    """How much is added before every axis, then behind; an attribute up to opset 10."""
    given = next((a for a in node.attribute if a.name == "pads"), None)
    if given is not None:
        return [int(w) for w in given.ints]
    if len(node.input) < 2 or node.input[1] not in constants:
        return None
    return [int(w) for w in onnx.numpy_helper.to_array(constants[node.input[1]])] or None
