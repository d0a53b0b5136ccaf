"""Convolutions and dense layers that CUDA kernels are tried with."""

from __future__ import annotations

from tests.kernels.anchor_cases import CASES
from tvm_hquant.kernels.interface import Placement
from tvm_hquant.operators import Conv2D, Dense, Epilogue, Window

WIDE = {
    "wide, padded": Conv2D((1, 7, 6, 64), 40, Window((3, 3), padding=(1, 1, 1, 1)), 1, Epilogue(has_bias=True)),
    "wide, strided, dilated": Conv2D((2, 9, 8, 18), 9, Window((2, 3), (1, 2), (2, 0, 1, 3), (2, 1))),
    "wide, grouped": Conv2D((1, 5, 5, 100), 48, Window((1, 1)), groups=2),
    "wide, dense": Dense(1, 70, 130),
    "wide, dense, rows": Dense(37, 48, 8),
}
"""Channels enough for tensor cores, with and without whole words, steps and tiles."""
DEPTHWISE = tuple(n for n, op in CASES.items() if isinstance(op, Conv2D) and op.is_depthwise)
NOT_DEPTHWISE = tuple(n for n in CASES if n not in DEPTHWISE)
"""Of the cases of all families those that are depthwise, and the others."""
PLACEMENT = Placement(3, 60)
"""A place in a wider buffer."""
