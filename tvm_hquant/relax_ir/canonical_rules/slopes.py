"""Slopes per channel: what has kernels and precisions already computes them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from tvm_hquant.relax_ir.describe import is_float32, operator_name, shape_of
from tvm_hquant.relax_ir.graph_rewriting import Graph


def spell_slopes(call: Any, graph: Graph) -> Any | None:
    """``R.nn.prelu`` of a map with a slope for each channel becomes a depthwise layer with a residual.

    x where x > 0, else slope · x, is x + (slope − 1) · min(x, 0)::

        lv = R.nn.prelu(x, slopes, axis=1)    →    lv = R.clip(x, -inf, 0)
                                                   lv1 = R.nn.conv2d(lv, slopes − 1 [C, 1, 1, 1], groups=C)
                                                   lv2 = R.add(lv1, x)

    One slope for all stays, and is a leaky ReLU.
    """
    if operator_name(call) != "relax.nn.prelu" or not is_float32(call) or int(call.attrs.axis) != 1:
        return None
    slopes, channels = graph.array(call.args[1]), shape_of(call)[1]
    if slopes is None or len(shape_of(call)) != 4 or slopes.size != channels or np.all(slopes == slopes.flat[0]):
        return None
    name = graph.name_of(call.args[1], "") or graph.fresh_weight_name("prelu")
    weights = graph.weight(slopes.astype(np.float64).reshape(channels, 1, 1, 1) - 1.0, name)
    negative = graph.emit(relax.op.clip(call.args[0], -math.inf, 0.0))
    return relax.op.add(graph.emit(relax.op.nn.conv2d(negative, weights, groups=channels)), call.args[0])
