"""Tensors that are stored with their axes in another order than the model means them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvm_hquant.relax_ir.describe import shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph

Order = tuple[int, ...]
"""For each axis as stored, the axis of the model that it is."""

CHANNELS_LAST: Order = (0, 2, 3, 1)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of the model and where its values are.

    Attributes:
        expression: the values, stored as ``model_tensor.transpose(order)``.
        order: the axes, see :data:`Order`.
        features: set for a flattened feature map whose last axis holds the model's elements in this order.
    """

    expression: Any
    order: Order
    features: npt.NDArray[np.int64] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is stored as the model means it."""
        return self.features is None and self.order == tuple(range(len(self.order)))

    @property
    def rank(self) -> int:
        return len(self.order)

    @property
    def model_shape(self) -> tuple[int, ...]:
        """The shape as the model means it."""
        stored = shape_of(self.expression)
        return tuple(stored[self.order.index(axis)] for axis in range(self.rank))

    def stored_axis(self, model_axis: int) -> int:
        """Where an axis of the model is stored; negative ones count from the end."""
        return self.order.index(model_axis % self.rank)


@dataclass(frozen=True, eq=False)
class TensorMap:
    """The tensors of ``main`` by the variable that the model binds them to, and the graph that computes them."""

    graph: Graph
    tensors: dict[Any, StoredTensor] = field(default_factory=dict)
    plain_copies: dict[Any, Any] = field(default_factory=dict)
    channels_last_copies: dict[Any, Any] = field(default_factory=dict)

    def of(self, expression: Any) -> StoredTensor:
        """A variable as it is stored; weights and constants are stored as they are meant."""
        if expression in self.tensors:
            return self.tensors[expression]
        return StoredTensor(expression, tuple(range(len(shape_of(expression)))))

    def plain(self, expression: Any) -> Any:
        """The values in the model's own order, computed once."""
        if isinstance(expression, relax.Tuple):
            return relax.Tuple([self.plain(f) for f in expression.fields])
        if not isinstance(expression, relax.Var) or expression not in self.tensors:
            return expression
        tensor = self.tensors[expression]
        if tensor.is_plain:
            return tensor.expression
        if expression not in self.plain_copies:
            back = [tensor.order.index(axis) for axis in range(tensor.rank)]
            self.plain_copies[expression] = self.graph.emit(relax.op.permute_dims(tensor.expression, back))
        return self.plain_copies[expression]

    def channels_last(self, expression: Any) -> Any:
        """The values of a tensor of four axes, channels last; constants are permuted in NumPy."""
        values = self.graph.array(expression)
        if values is not None:
            return self._like(values.transpose(CHANNELS_LAST), expression)
        tensor = self.of(expression)
        if tensor.order == CHANNELS_LAST:
            return tensor.expression
        if expression not in self.channels_last_copies:
            permuted = relax.op.permute_dims(self.plain(expression), list(CHANNELS_LAST))
            self.channels_last_copies[expression] = self.graph.emit(permuted)
        return self.channels_last_copies[expression]

    def broadcast_channels_last(self, expression: Any) -> Any:
        """An operand of an elementwise operator on channels-last tensors; fewer than four axes are filled up."""
        shape = self.of(expression).model_shape
        if len(shape) == 4 or not shape:
            return self.channels_last(expression) if shape else expression
        filled = (1,) * (4 - len(shape)) + shape
        values = self.graph.array(expression)
        if values is not None:
            return self._like(values.reshape(filled).transpose(CHANNELS_LAST), expression)
        reshaped = self.graph.emit(relax.op.reshape(self.plain(expression), filled))
        return self.graph.emit(relax.op.permute_dims(reshaped, list(CHANNELS_LAST)))

    def _like(self, values: npt.NDArray[Any], source: Any) -> Any:
        return self.graph.constant_like(np.ascontiguousarray(values), [source])
