"""Einstein sums that are products of matrices become ``MatMul``, between permutations.

TVM's importer makes a loop nest of an ``Einsum`` that no kernel of this project computes.
"""

from __future__ import annotations

from typing import Any

import onnx

from tvm_hquant.frontend.onnx_file import replace_nodes


def spell_einsum(model: Any) -> None:
    """Replaces ``Einsum`` nodes of two operands with one summed axis by ``MatMul``, in a model proto of our own.

    Axes of one operand alone may be several only for a matrix without other axes on the right, as in a dense layer. Other nodes
    stay as they are.
    """
    if any(node.op_type == "Einsum" for node in model.graph.node):
        replace_nodes(model.graph, lambda node: _product(node) if node.op_type == "Einsum" else None)


def _product(node: Any) -> list[Any] | None:
    """The nodes of a product; None where it is no product of matrices."""
    equation = next(a.s.decode() for a in node.attribute if a.name == "equation").replace(" ", "")
    left, _, rest = equation.partition(",")
    right, arrow, output = rest.partition("->")
    letters = left + right
    if not (arrow and letters.isalpha() and output.isalpha()) or any(
        len(set(t)) < len(t) for t in (left, right, output)
    ):
        return None
    shared = [axis for axis in left if axis in right]
    batch, summed = [a for a in shared if a in output], [a for a in shared if a not in output]
    rows, columns = [a for a in left if a not in right], [a for a in right if a not in left]
    if len(summed) != 1 or len(columns) != 1 or not rows or (batch and len(rows) > 1):
        return None
    if set(output) != {*batch, *rows, *columns}:
        return None
    nodes: list[Any] = []

    def turned(tensor: str, axes: str, wanted: list[str], name: str) -> str:
        if list(axes) == wanted:
            return tensor
        permutation = [axes.index(axis) for axis in wanted]
        nodes.append(onnx.helper.make_node("Transpose", [tensor], [name], perm=permutation))
        return name

    first, second = node.input
    result = node.output[0]
    first = turned(first, left, [*batch, *rows, *summed], f"{result}_rows")
    second = turned(second, right, [*batch, *summed, *columns], f"{result}_columns")
    product = [*batch, *rows, *columns]
    made = result if list(output) == product else f"{result}_product"
    nodes.append(onnx.helper.make_node("MatMul", [first, second], [made], name=node.name))
    turned(made, "".join(product), list(output), result)
    return nodes
