"""Opens calibration and evaluation data, from files or from Python, and checks it against a model's inputs.

A ``.npz`` file holds one array per model input under the input's name, samples along the first axis, and optionally
``labels``. A ``.npy`` file serves models with one input. A directory holds any number of such files, read in the
order of their names, and may hold ``labels.npy`` for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from tvm_hquant.calibration.array_files import ArrayInMemory, StoredArray, open_npy, open_npz
from tvm_hquant.calibration.samples import Array, DataSource, Sample, Signature
from tvm_hquant.calibration.validation import LABELS, InputCheck, check_labels, check_names, input_checks
from tvm_hquant.errors import DataError


@dataclass(frozen=True, eq=False)
class _Part:
    """The arrays of one file. ``is_one_sample``: they have no axis of samples."""

    arrays: Mapping[str, StoredArray]
    count: int
    is_one_sample: bool
    labels: tuple[int, ...] | None
    where: str

    def samples(self, checks: Mapping[str, InputCheck], first: int) -> Iterator[Sample]:
        """Samples whose indices in messages start at ``first``."""
        walks = {
            name: iter([array.whole()]) if self.is_one_sample else array.rows() for name, array in self.arrays.items()
        }
        labels: Iterable[int | None] = repeat(None) if self.labels is None else self.labels
        for index, label in zip(range(first, first + self.count), labels, strict=False):
            yield Sample(
                {name: check.convert(next(walks[name]), self.where, index) for name, check in checks.items()}, label
            )
        for walk in walks.values():
            next(walk, None)  # Lets a compressed array compare its checksum.


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Samples from arrays in files or in memory."""

    name: str
    checks: Mapping[str, InputCheck]
    parts: tuple[_Part, ...]

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def has_labels(self) -> bool:
        return self.parts[0].labels is not None

    def __iter__(self) -> Iterator[Sample]:
        first = 0
        for part in self.parts:
            yield from part.samples(self.checks, first)
            first += part.count


@dataclass(frozen=True, eq=False)
class IterableSource:
    """Samples from a Python iterable, walked through again each time."""

    name: str
    checks: Mapping[str, InputCheck]
    items: Callable[[], Iterable[Any]]
    has_labels: bool
    count: int | None = None

    def __iter__(self) -> Iterator[Sample]:
        first = 0
        for position, item in enumerate(self.items()):
            where = f"{self.name}, item {position}"
            arrays, labels = _split_item(item, self.checks, where)
            part = _make_part(arrays, labels, self.checks, where)
            if (part.labels is not None) != self.has_labels:
                raise DataError(f"{where}: either all samples have labels or none has; the first one differs here")
            yield from part.samples(self.checks, first)
            first += part.count


def open_data(data: Any, signature: Signature, name: str | None = None) -> DataSource:
    """Data as a source of samples that fit a model.

    Args:
        data: the path of a ``.npz`` or ``.npy`` file or of a directory of such files; a dict of arrays, samples along
            the first axis; an array, for a model with one input; or an iterable (or a function that returns one) of
            arrays, dicts of arrays, or pairs of one of these and a label. Items of an iterable are single samples,
            with or without a batch axis, or batches. What can be walked through only once, such as a generator, is kept
            in memory. A :class:`DataSource` is returned as it is.
        signature: shape, batch axis first, and dtype of each model input. The size of the batch axis is ignored.
        name: for messages; by default the path.

    Returns:
        A source whose samples have a batch axis of 1 and the model's dtypes. Floats are rounded to the model's float
        dtype, other conversions have to be exact. The first sample has been checked, later ones are when they are read.

    Raises:
        DataError: the data is missing, damaged, empty, or does not fit the model; the message says where and how.
    """
    if isinstance(data, DataSource):
        return data
    checks = input_checks(signature)
    source = _open(data, checks, name)
    if next(iter(source), None) is None:
        raise DataError(f"{source.name}: holds no samples; at least one is needed")
    return source


def _open(data: Any, checks: Mapping[str, InputCheck], name: str | None) -> DataSource:
    if isinstance(data, (str, Path)):
        path = Path(data)
        parts = _directory_parts(path, checks) if path.is_dir() else (_file_part(path, checks),)
        return ArraySource(name or str(path), checks, parts)
    where = name or "the data"
    if isinstance(data, Mapping) or hasattr(data, "__array__"):
        arrays, labels = _split_item(data, checks, where)
        return ArraySource(where, checks, (_make_part(arrays, labels, checks, where),))
    if callable(data) and not isinstance(data, Iterable):
        return _iterable_source(where, checks, data)
    if not isinstance(data, Iterable):
        raise DataError(
            f"{where}: a {type(data).__name__} is no source of samples; give a path, arrays, or an iterable of samples"
        )
    items: Iterable[Any] = list(data) if isinstance(data, Iterator) else data
    return _iterable_source(where, checks, lambda: items)


def _iterable_source(
    where: str, checks: Mapping[str, InputCheck], items: Callable[[], Iterable[Any]]
) -> IterableSource:
    first = list(islice(items(), 1))
    has_labels = bool(first) and _split_item(first[0], checks, f"{where}, item 0")[1] is not None
    return IterableSource(where, checks, items, has_labels)


def _file_part(path: Path, checks: Mapping[str, InputCheck]) -> _Part:
    if path.suffix == ".npy":
        return _make_part({_only_input(checks, str(path)): open_npy(path)}, None, checks, str(path))
    if path.suffix != ".npz" and path.exists():
        raise DataError(f"{path}: is neither a .npz nor a .npy file; numpy.savez and numpy.save write these")
    arrays: dict[str, StoredArray] = dict(open_npz(path))
    labels = arrays.pop(LABELS) if LABELS in arrays and LABELS not in checks else None
    return _make_part(arrays, None if labels is None else labels.whole(), checks, str(path))


def _directory_parts(path: Path, checks: Mapping[str, InputCheck]) -> tuple[_Part, ...]:
    common_labels = path / f"{LABELS}.npy"
    paths = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy") and p != common_labels)
    if not paths:
        raise DataError(f"{path}: holds no .npz or .npy file")
    parts = tuple(_file_part(p, checks) for p in paths)
    if common_labels.exists():
        return _with_common_labels(parts, common_labels)
    labelled = [part.labels is not None for part in parts]
    if any(labelled) and not all(labelled):
        part = parts[labelled.index(False)]
        raise DataError(
            f"{part.where}: has no labels, but other files of {path} have: give all of them labels, or none"
        )
    return parts


def _with_common_labels(parts: tuple[_Part, ...], path: Path) -> tuple[_Part, ...]:
    if any(part.labels is not None for part in parts):
        raise DataError(f"{path}: the other files of the directory hold labels of their own: keep one or the other")
    labels = iter(check_labels(open_npy(path).whole(), sum(part.count for part in parts), str(path)))
    return tuple(
        _Part(part.arrays, part.count, part.is_one_sample, tuple(islice(labels, part.count)), part.where)
        for part in parts
    )


def _split_item(item: Any, checks: Mapping[str, InputCheck], where: str) -> tuple[dict[str, StoredArray], Any]:
    """Arrays by input name, and labels or None."""
    labels = None
    if isinstance(item, tuple):
        if len(item) != 2:
            raise DataError(f"{where}: is a tuple of {len(item)}; give (inputs, label), with a dict for several inputs")
        item, labels = item
    if not isinstance(item, Mapping):
        return {_only_input(checks, where): ArrayInMemory(_as_array(item, where))}, labels
    arrays = dict(item)
    if labels is None and LABELS not in checks:
        labels = arrays.pop(LABELS, None)
    return {str(key): ArrayInMemory(_as_array(value, where)) for key, value in arrays.items()}, labels


def _as_array(value: Any, where: str) -> Array:
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: is no array of numbers ({error})") from None


def _only_input(checks: Mapping[str, InputCheck], where: str) -> str:
    if len(checks) != 1:
        names = ", ".join(map(repr, checks))
        raise DataError(
            f"{where}: is one array, but the model has the inputs {names}: give arrays by name (.npz or dict)"
        )
    return next(iter(checks))


def _make_part(arrays: Mapping[str, StoredArray], labels: Any, checks: Mapping[str, InputCheck], where: str) -> _Part:
    check_names(arrays, list(checks), where)
    counts: dict[str, int] = {}
    lone: dict[str, bool] = {}
    for name, check in checks.items():
        check.check_dtype(arrays[name].dtype, where)
        lone[name] = check.holds_one_sample(arrays[name].shape, where)
        counts[name] = 1 if lone[name] else arrays[name].shape[0]
    if len(set(counts.values())) != 1 or len(set(lone.values())) != 1:
        found = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        raise DataError(f"{where}: the inputs have different numbers of samples ({found}): give each sample all inputs")
    count = next(iter(chain(counts.values(), [0])))
    checked = None if labels is None else check_labels(labels, count, where)
    return _Part({name: arrays[name] for name in checks}, count, any(lone.values()), checked, where)
