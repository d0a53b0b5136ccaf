"""Linear resizing in the contract: protects where outputs lie and how their neighbours are mixed."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import numpy as np
import pytest

from tvm_hquant import numerics
from tvm_hquant.kernels.interface import IntegerElementwiseConstants, KernelRequest, NoConstants, Requantization
from tvm_hquant.operators import Resize2D
from tvm_hquant.relax_ir.describe import resize_positions

MODES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")


def _real(mode: str, index: int, size: int, out_size: int) -> Fraction:
    """ONNX's formulas (operator Resize), as rational numbers."""
    half = Fraction(2 * index + 1, 2) * Fraction(size, out_size) - Fraction(1, 2)
    match mode:
        case "half_pixel":
            return half
        case "asymmetric":
            return Fraction(index * size, out_size)
        case "align_corners":
            return Fraction(index * (size - 1), out_size - 1) if out_size > 1 else Fraction(0)
        case _:
            return half if out_size > 1 else Fraction(0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("size", "out_size"), [(5, 9), (7, 3), (4, 8), (1, 3), (6, 1)])
def test_where_outputs_lie(mode: str, size: int, out_size: int) -> None:
    """Against ONNX's own formulas in rational arithmetic, on a ramp, whose interpolation is the position itself."""
    positions = resize_positions(mode, size, out_size)
    assert positions is not None
    operator = Resize2D((1, size, 1, 1), (out_size, 1), positions, (1, 0, 1))
    ramp = np.arange(size, dtype=np.float32).reshape(1, size, 1, 1)
    found = numerics.evaluate(KernelRequest(operator, ("float32",), "float32"), NoConstants(), [ramp])
    expected = [min(max(_real(mode, i, size, out_size), 0), size - 1) for i in range(out_size)]
    np.testing.assert_allclose(found.reshape(-1), [float(e) for e in expected], rtol=1e-6, atol=1e-6)


def test_codes_are_mixed_exactly_and_rounded_once() -> None:
    """Halfway between two codes, ties to even decide; the multiplier meets the mixed value, not each code."""
    positions = resize_positions("half_pixel", 2, 4)
    assert positions is not None
    operator = Resize2D((1, 2, 2, 1), (4, 4), positions, positions)
    codes = np.array([[10, 14], [30, 7]], np.uint8).reshape(1, 2, 2, 1)
    constants = IntegerElementwiseConstants((10,), (np.float32(0.5),), Requantization(-3.0, 252.0, 3))
    found = numerics.evaluate(KernelRequest(operator, ("uint8",), "uint8"), constants, [codes])
    for row in range(4):
        for column in range(4):
            y, x = (min(max(Fraction(2 * i - 1, 4), 0), 1) for i in (row, column))
            a, b, c, d = (int(v) - 10 for v in codes.reshape(-1))
            mixed = (1 - y) * ((1 - x) * a + x * b) + y * ((1 - x) * c + x * d)
            half = mixed / 2
            rounded = floor(half + Fraction(1, 2))
            if half + Fraction(1, 2) == rounded and rounded % 2:
                rounded -= 1
            assert int(found[0, row, column, 0]) == rounded + 3
