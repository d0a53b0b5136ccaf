"""Gradients with respect to the weights of layers, from the gradient at their sums: the chain rule's last step.

Each is a product of two matrices that both change with the sample: what the layer read, one row for each position of the
window, and the gradient at its sums. NumPy's BLAS computes it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.numerics.windows import pad_spatial, positions
from tvm_hquant.operators import Anchor, Conv2D

Array = npt.NDArray[Any]


def weight_gradient(operator: Anchor, values: Array, sum_gradient: Array) -> Array:
    """∂loss/∂W.

    Args:
        operator: the convolution or dense layer.
        values: what it read, of its input shape (channels-last).
        sum_gradient: ∂loss/∂sums, of its output shape.

    Returns:
        [out_channels, in_channels / groups, kernel_h, kernel_w] in the dtype of the arguments.
    """
    if not isinstance(operator, Conv2D):
        product = sum_gradient.reshape(-1, operator.out_features).T @ values.reshape(-1, operator.in_features)
        return np.asarray(product)[:, :, None, None]
    output_size = operator.window.output_size(*operator.input_shape[1:3])
    rows = [
        np.ascontiguousarray(part).reshape(-1, operator.in_channels)
        for part in positions(pad_spatial(values, operator.window, 0.0), operator.window, output_size)
    ]
    gradients = sum_gradient.reshape(-1, operator.out_channels)
    if operator.is_depthwise:
        parts = [np.einsum("pc,pc->c", gradients, row)[:, None] for row in rows]
    else:
        parts = [_grouped_product(gradients, row, operator.groups) for row in rows]
    return np.stack(parts, axis=-1).reshape(operator.weight_shape)


def _grouped_product(gradients: Array, rows: Array, groups: int) -> Array:
    """[positions, out] and [positions, in] to [out, in / groups]: a product for each group."""
    per_group = rows.shape[1] // groups
    out_per_group = gradients.shape[1] // groups
    return np.concatenate(
        [
            gradients[:, g * out_per_group : (g + 1) * out_per_group].T @ rows[:, g * per_group : (g + 1) * per_group]
            for g in range(groups)
        ]
    )
