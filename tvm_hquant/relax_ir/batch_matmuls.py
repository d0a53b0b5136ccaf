"""Finds products of two activations in ``main``, with the permutations and the factor around them.

Attention arrives as::

    lv1 = R.permute_dims(q, [0, 2, 1, 3])     # [batch, token, head, depth]
    lv2 = R.permute_dims(k, [0, 2, 3, 1])
    lv3 = R.matmul(lv1, lv2)
    lv4 = R.multiply(lv3, 0.125)

All four are one :class:`~tvm_hquant.operators.BatchMatmul`, whose kernels read and write through the permutations, as long
as rows of a matrix stay together in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_hquant.layers import constant_array, is_constant
from tvm_hquant.operators import BatchMatmul, Shape
from tvm_hquant.relax_ir.describe import describe_batch_matmul, operator_name, permutation, scalar_factor, shape_of

Bindings = Sequence[tuple[Any, Any]]
Readers = Mapping[Any, Sequence[int]]


@dataclass(frozen=True, eq=False)
class FoundBatchMatmul:
    """One product: the positions of its bindings in ascending order, its inputs, and what it computes."""

    indices: tuple[int, ...]
    inputs: tuple[Any, Any]
    operator: BatchMatmul


def find_batch_matmuls(bindings: Bindings, readers: Readers) -> list[FoundBatchMatmul]:
    """All products of two activations among (variable, value) pairs.

    ``readers`` gives the positions of the bindings that read a variable, and the number of all bindings where the graph gives
    it out.
    """
    position = {var: i for i, (var, _) in enumerate(bindings)}
    found = []
    for index, (_, value) in enumerate(bindings):
        operator = describe_batch_matmul(value)
        if operator is not None:
            found.append(_around(index, operator, bindings, position, readers))
    return found


def _around(
    index: int, operator: BatchMatmul, bindings: Bindings, position: Mapping[Any, int], readers: Readers
) -> FoundBatchMatmul:
    call = bindings[index][1]
    indices = [index]
    inputs, orders = [call.args[0], call.args[1]], list(operator.input_axes)
    for number in range(2):
        before = position.get(call.args[number])
        if before is None or list(readers[call.args[number]]) != [index]:
            continue
        moved = bindings[before][1]
        order = _permuted(moved)
        if order is None or moved.args[0].same_as(inputs[1 - number]):
            # Two readings of one tensor would change places with their formats.
            continue
        if order[-1] == len(order) - 1 or (number == 1 and order[-2] == len(order) - 1):
            inputs[number], orders[number] = moved.args[0], order
            indices.append(before)
    last, scale, output = index, 1.0, operator.output_axes
    while (following := _only_reader(bindings[last][0], bindings, readers)) is not None:
        value = bindings[following][1]
        factor = scalar_factor(value, _array)
        order = _permuted(value)
        if factor is not None and shape_of(value) == shape_of(bindings[last][0]):
            scale *= factor
        elif order is not None and order[-1] == len(order) - 1 and output == operator.output_axes:
            output = order
        else:
            break
        last = following
        indices.append(following)
    shapes = (shape_of(inputs[0]), shape_of(inputs[1]))
    whole = BatchMatmul(shapes, (orders[0], orders[1]), output, float(np.float32(scale)))
    return FoundBatchMatmul(tuple(sorted(indices)), (inputs[0], inputs[1]), whole)


def _array(expression: Any) -> Any:
    return constant_array(expression) if is_constant(expression) else None


def _permuted(value: Any) -> Shape | None:
    return permutation(value) if operator_name(value) == "relax.permute_dims" else None


def _only_reader(var: Any, bindings: Bindings, readers: Readers) -> int | None:
    indices = readers.get(var, ())
    return indices[0] if len(indices) == 1 and indices[0] < len(bindings) else None
