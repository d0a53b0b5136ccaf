"""First and second moments of what layers with weights read: what the rounding of weights needs to know of the data.

An output of a layer is a sum over *columns*, one for every weight of an output channel: an input channel at one position of
the window. The error that rounded weights make in it has the mean δ·μ and the variance δᵀ·C·δ, δ being the errors of the
weights and μ and C the mean and covariance of the columns. Both are collected in the one pass of calibration, from at most
64 positions of each sample, which are spread over the whole tensor and differ from sample to sample: neighbouring positions
say nearly the same.

Memory does not depend on the number of samples. It would grow with the square of the number of columns, so layers with many
columns are cut into blocks of whole input channels, and correlations between blocks are taken for zero.

Rows are centred, some samples at a time, before they are multiplied, and what the means of these differ by is added (T. Chan,
G. Golub, R. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1): where the
means are large against the spread, a difference of second moments in float32 would be no covariance at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tvm_hquant.errors import DataError
from tvm_hquant.layers import Layer
from tvm_hquant.operators import Conv2D, Dense

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

POSITIONS_PER_SAMPLE = 64
LARGEST_BLOCK = 1536
"""Columns up to which all correlations of a layer are kept."""
BLOCK_OF_LARGE_LAYERS = 512
_ROWS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class InputMoments:
    """Moments of the columns of one layer.

    Attributes:
        count: rows that were observed.
        means: float64 [groups, columns], columns in the order of the weights ``[in_channels / groups, kernel_h, kernel_w]``;
            padding takes part with its zeros.
        covariances: for each block of columns in order, float64 [groups, block, block].
    """

    count: int
    means: Floats
    covariances: tuple[Floats, ...]


class InputMomentsCollector:
    """Collects the moments of the columns of all ``layers`` (those with weights)."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._readers: dict[str, list[_ColumnSums]] = {}
        for layer in layers:
            self._readers.setdefault(layer.inputs[0], []).append(_ColumnSums(layer))

    def observe(self, tensor: str, values: npt.NDArray[np.float32]) -> None:
        """Takes in one tensor of one sample or batch, channels last; tensors that no layer reads are left out."""
        for sums in self._readers.get(tensor, ()):
            sums.observe(values)

    def moments(self) -> Mapping[str, InputMoments]:
        """By the name of the layer; only of layers whose input was observed.

        Raises:
            DataError: variances of a layer's input are beyond float32.
        """
        every = (sums for readers in self._readers.values() for sums in readers)
        return {sums.layer: sums.moments() for sums in every if sums.count}


class _ColumnSums:
    """Means of the columns of one layer, and sums of the products of their deviations."""

    def __init__(self, layer: Layer) -> None:
        operator = layer.operator
        assert isinstance(operator, (Conv2D, Dense))
        self.layer = layer.name
        self.count = 0
        self._seen = 0
        self._convolution = operator if isinstance(operator, Conv2D) else None
        groups = operator.groups if isinstance(operator, Conv2D) else 1
        taps = math.prod(operator.weight_shape[2:])
        columns = math.prod(operator.weight_shape[1:])
        size = columns if columns <= LARGEST_BLOCK else max(1, BLOCK_OF_LARGE_LAYERS // taps) * taps
        self._blocks = [slice(start, min(start + size, columns)) for start in range(0, columns, size)]
        self._taken_in = 0
        self._means = np.zeros((groups, columns))
        self._products = [np.zeros((groups, b.stop - b.start, b.stop - b.start), np.float32) for b in self._blocks]
        self._waiting: list[Array] = []

    def observe(self, values: Array) -> None:
        rows = self._rows(values)
        self.count += rows.shape[1]
        self._waiting.append(rows)
        if sum(waiting.shape[1] for waiting in self._waiting) >= min(rows.shape[2], _ROWS_AT_ONCE):
            self._take_in()

    def _take_in(self) -> None:
        """Few rows make a product as large as many do, so some samples are waited for."""
        rows = np.concatenate(self._waiting, axis=1)
        self._waiting = []
        count = rows.shape[1]
        total = self._taken_in + count
        means = rows.mean(axis=1, dtype=np.float64)
        away = means - self._means
        centred = rows - means[:, None, :].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # `moments` says so in words
            for block, products in zip(self._blocks, self._products, strict=True):
                part = centred[:, :, block]
                products += part.transpose(0, 2, 1) @ part
                if self._taken_in:
                    between = (away[:, block] * math.sqrt(self._taken_in * count / total)).astype(np.float32)
                    products += between[:, :, None] * between[:, None, :]
        self._means += away * (count / total)
        self._taken_in = total

    def moments(self) -> InputMoments:
        if self._waiting:
            self._take_in()
        if not all(np.isfinite(products).all() for products in self._products):
            raise DataError(
                f"layer {self.layer}: what it reads while calibrating varies by more than 10¹⁹, whose square float32 cannot "
                "hold: check the model's weights and the preprocessing of the samples"
            )
        covariances = tuple(products.astype(np.float64) / self.count for products in self._products)
        return InputMoments(self.count, self._means, covariances)

    def _rows(self, values: Array) -> Array:
        """Some rows of columns: float32 [groups, rows, columns]."""
        operator = self._convolution
        if operator is None:
            flat = values.reshape(-1, values.shape[-1])
            return flat[self._positions(len(flat))][None]
        window = operator.window
        batch, height, width, channels = values.shape
        out_height, out_width = window.output_size(height, width)
        sample, position = np.divmod(self._positions(batch * out_height * out_width), out_height * out_width)
        row, column = np.divmod(position, out_width)
        tap_rows, tap_columns = np.divmod(np.arange(math.prod(window.kernel)), window.kernel[1])
        y = row[:, None] * window.strides[0] - window.padding[0] + tap_rows * window.dilation[0]
        x = column[:, None] * window.strides[1] - window.padding[1] + tap_columns * window.dilation[1]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        found = values[sample[:, None], np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)]
        found = np.where(inside[:, :, None], found, np.float32(0))
        by_group = found.reshape(*inside.shape, operator.groups, channels // operator.groups)
        rows = by_group.transpose(2, 0, 3, 1).reshape(operator.groups, len(inside), -1)
        return np.ascontiguousarray(rows)

    def _positions(self, available: int) -> npt.NDArray[np.int64]:
        """At most 64 of the positions: multiples of a step near the golden section, which leave no large gaps."""
        if available <= POSITIONS_PER_SAMPLE:
            return np.arange(available)
        step = round(available * (math.sqrt(5) - 1) / 2)
        while math.gcd(step, available) != 1:
            step += 1
        first = self._seen
        self._seen = (first + POSITIONS_PER_SAMPLE) % available
        return (first + np.arange(POSITIONS_PER_SAMPLE)) * step % available
