"""Checks arrays against the inputs of a model and turns them into samples, or says what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tvm_hquant.calibration.samples import Array, DataSource
from tvm_hquant.errors import DataError

LABELS = "labels"
"""The name under which data holds labels, unless a model input has that name."""

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class InputCheck:
    """What one model input takes. ``row_shape`` is the shape of a sample without its batch axis."""

    name: str
    row_shape: tuple[int, ...]
    has_batch_axis: bool
    dtype: np.dtype[Any]

    def holds_one_sample(self, shape: tuple[int, ...], where: str) -> bool:
        """True for the shape of a lone sample, False for samples along the first axis.

        Raises:
            DataError: the shape is neither.
        """
        if shape == self.row_shape:
            return True
        if len(shape) == len(self.row_shape) + 1 and shape[1:] == self.row_shape:
            return False
        found = shape[1:] if len(shape) == len(self.row_shape) + 1 else shape
        hint = (
            "; these are the same sizes in another order: transpose the samples"
            if found != self.row_shape and sorted(found) == sorted(self.row_shape)
            else ""
        )
        raise DataError(
            f"{where}: array {self.name!r} has shape {list(shape)}, but the model takes samples of shape "
            f"{list(self.row_shape)}, one after the other along a first axis{hint}"
        )

    def check_dtype(self, dtype: np.dtype[Any], where: str) -> None:
        """Raises DataError for what is no number."""
        if dtype.kind not in "fiub" and dtype != _BFLOAT16:
            raise DataError(
                f"{where}: array {self.name!r} has dtype {dtype}, but the model takes {self.dtype}: "
                "convert it to numbers"
            )

    def convert(self, row: Array, where: str, index: int) -> Array:
        """One sample as the model takes it, with a batch axis of 1.

        Floats are rounded to the model's float dtype; any other conversion has to be exact.

        Raises:
            DataError: NaN, infinity, or a value that the model's dtype cannot hold.
        """
        what = f"{where}: array {self.name!r}, sample {index},"
        if _is_float(row.dtype) and not np.isfinite(row).all():
            raise DataError(f"{what} holds NaN or infinity: remove the sample or repair its preprocessing")
        with np.errstate(over="ignore", invalid="ignore"):
            converted = row.astype(self.dtype, order="C")
            if _is_float(row.dtype) and _is_float(self.dtype):
                kept = bool(np.isfinite(converted).all())
            else:
                # Both ways: comparing promotes to float64, which can hide a loss, and int8 wraps back to uint8.
                kept = np.array_equal(converted, row) and np.array_equal(converted.astype(row.dtype), row)
        if not kept:
            raise DataError(
                f"{what} holds {row.dtype} values that {self.dtype}, which the model takes, cannot represent: "
                f"convert the data to {self.dtype} yourself"
            )
        return converted[np.newaxis] if self.has_batch_axis else converted


def input_checks(signature: Any) -> dict[str, InputCheck]:
    """One check per model input, in the signature's order."""
    return {
        name: InputCheck(name, tuple(int(size) for size in shape[1:]), len(shape) > 0, np.dtype(dtype))
        for name, (shape, dtype) in signature.items()
    }


def check_names(found: Iterable[str], expected: Sequence[str], where: str) -> None:
    """Raises DataError unless exactly the model's inputs are there, labels aside."""
    names = list(found)
    missing = [name for name in expected if name not in names]
    unknown = [name for name in names if name not in expected and name != LABELS]
    if missing or unknown:
        raise DataError(
            f"{where}: found the arrays {_quoted(names)}, but the model has the inputs {_quoted(expected)}: give one "
            f"array per input under the input's name, and labels, if any, under {LABELS!r}"
        )


def check_labels(labels: Any, count: int, where: str) -> tuple[int, ...]:
    """Labels of ``count`` samples as integers; the shape may be [count] or [count, 1], or [] for one sample.

    Raises:
        DataError: wrong length, shape or dtype, or a negative label.
    """
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise DataError(f"{where}: labels are no array of integers ({error})") from None
    if array.dtype.kind not in "iub":
        raise DataError(f"{where}: labels have dtype {array.dtype}; give class indices as integers that count from 0")
    if array.ndim == 2 and array.shape[1] > 1:
        raise DataError(f"{where}: labels have shape {list(array.shape)}; if they are one-hot, give their argmax")
    if array.size != count or array.ndim > 2:
        raise DataError(f"{where}: labels have shape {list(array.shape)}, but there are {count} samples: give one each")
    if array.size and int(array.min()) < 0:
        raise DataError(f"{where}: label {int(array.min())} is negative; class indices count from 0")
    return tuple(int(label) for label in array.reshape(-1))


def check_class(label: int, classes: int, where: str = "") -> None:
    """Raises DataError unless a label names one of the classes of a model's output; ``where`` says whose label it is."""
    if not 0 <= label < classes:
        raise DataError(
            f"{where}{': ' if where else ''}label {label} is none of the {classes} classes of the model's output: labels count "
            "from 0"
        )


def check_classes(source: DataSource, classes: int) -> None:
    """The same for all labels of a source, which is walked through once."""
    for number, sample in enumerate(source):
        if sample.label is not None:
            check_class(sample.label, classes, f"{source.name}, sample {number}")


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == _BFLOAT16


def _quoted(names: Sequence[str]) -> str:
    shown = [repr(name) for name in names[:12]]
    return ", ".join(shown + ["…"] * (len(names) > 12)) or "(none)"
