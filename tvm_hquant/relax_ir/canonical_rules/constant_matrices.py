"""Products with constant matrices, other than one on the right, become convolutions of maps with one row, or a dense layer.

Several matrices on the right are the groups of a convolution::

    lv = R.matmul(x, W [H, K, N])                # x is [H, M, K]

becomes::

    lv = R.permute_dims(R.reshape(x, (1, H, M, K)), [0, 2, 1, 3])
    lv1 = R.permute_dims(R.reshape(lv, (1, 1, M, H·K)), [0, 3, 1, 2])          # moves nothing once maps are channels-last
    lv2 = R.nn.conv2d(lv1, V [H·N, K, 1, 1], groups=H)
    lv3 = R.reshape(R.permute_dims(lv2, [0, 2, 3, 1]), (1, M, H, N))
    lv4 = R.reshape(R.permute_dims(lv3, [0, 2, 1, 3]), (H, M, N))

Where all of them meet the same activations they are one dense layer, whose outputs are cut apart. The columns of a matrix on
the left meet what are channels of a map already. The same numbers are added in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvm_hquant.relax_ir.describe import is_float32, operator_name, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class _Matrices:
    """Constant matrices of a product.

    Attributes:
        values: [matrix, outputs, inputs].
        batch: products with all of them.
        are_shared: whether all of them meet the same activations.
        name: of the weights.
    """

    values: Array
    batch: int
    are_shared: bool
    name: str

    @property
    def groups(self) -> int:
        return 1 if self.are_shared else len(self.values)

    def as_convolution(self, data: Any, graph: Graph) -> Any:
        """The products with the channels of a map."""
        _, _, inputs = self.values.shape
        weights = graph.weight(self.values.reshape(-1, inputs, 1, 1), self.name)
        return graph.emit(relax.op.nn.conv2d(data, weights, groups=self.groups))


def spell_product_with_constants(call: Any, graph: Graph) -> Any | None:
    """``R.matmul`` with constant matrices, other than one on the right, becomes ``R.nn.conv2d`` or ``R.matmul`` with one."""
    if operator_name(call) != "relax.matmul" or not is_float32(call):
        return None
    first, second = (graph.array(argument) for argument in call.args)
    if first is None and second is not None and second.ndim > 2:
        matrices = _matrices(np.swapaxes(second, -1, -2), call.args[1], call.args[0], graph)
        return None if matrices is None else _on_the_right(call, matrices, graph)
    if first is not None and second is None and first.ndim >= 2:
        matrices = _matrices(first, call.args[0], call.args[1], graph)
        return None if matrices is None else _on_the_left(call, matrices, graph)
    return None


def _matrices(values: Array, constant: Any, data: Any, graph: Graph) -> _Matrices | None:
    """Constants [..., outputs, inputs]; None where some activations meet several matrices and others do not."""
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    several, leading = values.shape[:-2], shape_of(data)[:-2]
    own = leading[len(leading) - len(several) :] if len(leading) >= len(several) else leading
    are_shared = all(size == 1 for size in own)
    if len(shape_of(data)) < 2 or (own != several and not are_shared):
        return None
    batch = math.prod(leading) // (1 if are_shared else math.prod(several))
    name = graph.name_of(constant, "") or graph.fresh_weight_name("matmul")
    return _Matrices(values.reshape(-1, *values.shape[-2:]), batch, are_shared, name)


def _on_the_right(call: Any, matrices: _Matrices, graph: Graph) -> Any:
    count, outputs, inputs = matrices.values.shape
    batch, rows = matrices.batch, shape_of(call)[-2]
    if matrices.are_shared:
        weights = graph.weight(matrices.values.reshape(-1, inputs).T, matrices.name)
        product = graph.emit(relax.op.matmul(call.args[0], weights))
    else:
        apart = graph.emit(relax.op.reshape(call.args[0], (batch, count, rows, inputs)))
        joined = graph.emit(relax.op.permute_dims(apart, [0, 2, 1, 3]))
        row = graph.emit(relax.op.reshape(joined, (batch, 1, rows, count * inputs)))
        data = graph.emit(relax.op.permute_dims(row, [0, 3, 1, 2]))
        product = graph.emit(relax.op.permute_dims(matrices.as_convolution(data, graph), [0, 2, 3, 1]))
    if count > 1:
        product = graph.emit(relax.op.reshape(product, (batch, rows, count, outputs)))
        product = graph.emit(relax.op.permute_dims(product, [0, 2, 1, 3]))
    return relax.op.reshape(product, shape_of(call))


def _on_the_left(call: Any, matrices: _Matrices, graph: Graph) -> Any:
    inputs, columns = matrices.values.shape[-1], shape_of(call)[-1]
    data = relax.op.reshape(call.args[1], (matrices.batch, matrices.groups * inputs, 1, columns))
    return relax.op.reshape(matrices.as_convolution(graph.emit(data), graph), shape_of(call))
