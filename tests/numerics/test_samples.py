"""Many samples in one call: protects that the oracle gives each sample what it gives it alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tvm_hquant import numerics
from tvm_hquant.kernels.interface import (
    BiasConstants,
    DequantizeConstants,
    FillConstants,
    FloatAnchorConstants,
    FloatElementwiseConstants,
    IntegerAnchorConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    LayerConstants,
    NoConstants,
    NormalizationConstants,
    Requantization,
)
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.numerics.samples import stacked_operator
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    BiasAdd,
    Concat,
    Conv2D,
    Convert,
    Dense,
    Epilogue,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Opaque,
    Operator,
    Softmax,
    Unary,
    Window,
)

Array = npt.NDArray[Any]
RANDOM = np.random.default_rng(0)
END = Requantization(-100.0, 150.0, 100)


def anchor_constants(*shape: int) -> IntegerAnchorConstants:
    codes = RANDOM.integers(-127, 128, (2, *shape)).astype(np.int8)
    scales = RANDOM.uniform(1e-4, 1e-3, (2, shape[0])).astype(np.float32)
    return IntegerAnchorConstants(codes, 37, scales, np.zeros(shape[0], np.float32), END, 0.5, 99)


def float_constants(*shape: int) -> FloatAnchorConstants:
    return FloatAnchorConstants(
        RANDOM.normal(size=shape).astype(np.float32), RANDOM.normal(size=shape[0]).astype(np.float32), -1.0, 1.0
    )


MAP = (1, 5, 4, 6)
PADDED = Window((3, 3), (2, 1), (1, 1, 0, 1))
POOL = IntegerElementwiseConstants((7,), (RANDOM.uniform(0, 0.2, (2, 4)).astype(np.float32),), END)
PRODUCTS = IntegerElementwiseConstants((3, 128), (np.float32(0.002),), END)
SUM = IntegerElementwiseConstants((3, 250), (np.float32(0.7), np.float32(0.4)), END)
GAMMA_AND_BETA = NormalizationConstants(*(RANDOM.normal(size=6).astype(np.float32) for _ in range(2)))
CASES: list[tuple[Operator, str, LayerConstants]] = [
    (Conv2D(MAP, 4, PADDED, 1, Epilogue(True, True)), "uint8", anchor_constants(4, 6, 3, 3)),
    (Conv2D(MAP, 6, PADDED, 6), "uint16", anchor_constants(6, 1, 3, 3)),
    (Conv2D(MAP, 4, PADDED, 2), "uint8", anchor_constants(4, 3, 3, 3)),
    (Conv2D(MAP, 4, PADDED, 1, Epilogue(True, True)), "float32", float_constants(4, 6, 3, 3)),
    (Dense(2, 6, 5), "uint8", anchor_constants(5, 6, 1, 1)),
    (Dense(6, 6, 5, leading_shape=(2, 3)), "float32", float_constants(5, 6, 1, 1)),
    (Add(MAP), "uint8", SUM),
    (Add(MAP), "float32", NoConstants()),
    (MaxPool2D(MAP, PADDED), "uint8", NoConstants()),
    (AveragePool2D(MAP, PADDED), "uint8", POOL),
    (AveragePool2D(MAP, PADDED), "float32", NoConstants()),
    (Concat((MAP, (1, 5, 4, 2)), 3), "uint8", NoConstants()),
    (Unary(MAP, "sigmoid"), "float32", FloatElementwiseConstants()),
    (Softmax((2, 7), 1), "float32", NoConstants()),
    (BiasAdd(MAP, (4, 6)), "float32", BiasConstants(RANDOM.normal(size=(4, 6)))),
    (BiasAdd(MAP, (1, 5, 1, 6)), "float32", BiasConstants(RANDOM.normal(size=(1, 5, 1, 6)))),
    (GroupNormalization(MAP, 1, 3, 1e-5, 2), "float32", GAMMA_AND_BETA),
    (GroupNormalization((2, 6), 1, 1, 1e-5), "float32", GAMMA_AND_BETA),
    (LocalResponseNormalization(MAP, 3, 1e-2, 0.75, 1.0), "float32", NoConstants()),
    (Convert(MAP), "uint8", DequantizeConstants(0.3, 12)),
    (Movement("reshape", MAP, (2, 60)), "uint8", NoConstants()),
    (Movement("permute_dims", MAP, (1, 6, 5, 4), (0, 3, 1, 2)), "uint8", NoConstants()),
    (Movement("take", MAP, (1, 5, 4, 3), (3, 5, 0, 1)), "uint8", NoConstants()),
    (Movement("strided_slice", MAP, (1, 2, 4, 6), (1, 1, 2)), "uint8", NoConstants()),
    (Movement("depth_to_space", MAP, (1, 14, 8, 1), (1, 3, 2, 1, 0)), "uint8", NoConstants()),
    (Movement("pad", MAP, (1, 7, 4, 6), (0, 0, 1, 1, 0, 0, 0, 0)), "uint8", FillConstants(9)),
    (BatchMatmul(((1, 3, 4), (1, 5, 4)), ((0, 1, 2), (0, 2, 1)), (0, 1, 2), 0.5), "float32", NoConstants()),
    (BatchMatmul(((1, 3, 4), (1, 5, 4)), ((0, 1, 2), (0, 2, 1)), (0, 2, 1)), "uint8", PRODUCTS),
]  # fmt: skip
MIXING: list[tuple[Operator, str, LayerConstants]] = [
    (Concat(((1, 3), (2, 3)), 0), "uint8", NoConstants()),
    (Softmax((4, 2), 0), "float32", NoConstants()),
    (BiasAdd((3, 2), (3, 1)), "float32", BiasConstants(RANDOM.normal(size=(3, 1)))),
    (GroupNormalization((6,), 0, 0, 1e-5), "float32", GAMMA_AND_BETA),
    (BatchMatmul(((3, 4), (4, 5)), ((0, 1), (0, 1)), (0, 1)), "float32", NoConstants()),
    (BatchMatmul(((2, 3, 4), (1, 4, 5)), ((0, 1, 2), (0, 1, 2)), (0, 1, 2)), "float32", NoConstants()),
    (Movement("permute_dims", (2, 3), (3, 2), (1, 0)), "uint8", NoConstants()),
    (Movement("take", (3, 2), (2, 2), (0, 2, 0)), "uint8", NoConstants()),
    (Movement("strided_slice", (3, 2), (2, 2), (0, 1, 1)), "uint8", NoConstants()),
    (Movement("pad", (3, 2), (4, 2), (1, 0, 0, 0)), "uint8", FillConstants(9)),
]


@pytest.mark.parametrize(("operator", "storage", "constants"), CASES + MIXING)
def test_each_sample_gets_what_it_gets_alone(operator: Operator, storage: Any, constants: LayerConstants) -> None:
    """Every operator, with an axis 0 that holds the sample as well as one that the operator mixes."""
    shapes = input_shapes(operator)
    output = storage if not isinstance(constants, DequantizeConstants) else "float32"
    weights, points = "", 1
    if isinstance(constants, (IntegerAnchorConstants, FloatAnchorConstants)):
        weights, points = ("int8", 2) if isinstance(constants, IntegerAnchorConstants) else ("float32", 1)
    request = KernelRequest(operator, (storage,) * len(shapes), output, weights, points)
    samples = [[stored(shape, storage) for shape in shapes] for _ in range(3)]
    together = numerics.evaluate_samples(request, constants, samples)
    assert (stacked_operator(operator, 3) is None) == any(operator is case[0] for case in MIXING)
    for sample, result in zip(samples, together, strict=True):
        np.testing.assert_array_equal(result, numerics.evaluate(request, constants, sample), strict=True)


def test_operators_outside_the_contract() -> None:
    """Nobody knows how they treat their axes."""
    assert stacked_operator(Opaque("relax.sort", ((2, 2),), (2, 2)), 2) is None


def stored(shape: tuple[int, ...], storage: str) -> Array:
    if storage == "float32":
        return RANDOM.normal(size=shape).astype(np.float32)
    return RANDOM.integers(0, np.iinfo(storage).max, shape, dtype=storage, endpoint=True)
