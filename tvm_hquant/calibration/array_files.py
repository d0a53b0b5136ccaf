"""Arrays in ``.npy`` and ``.npz`` files, read row by row, so that memory does not grow with their length."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from tvm_hquant.calibration.samples import Array
from tvm_hquant.errors import DataError


class StoredArray(Protocol):
    """An array that is somewhere else until its rows are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def rows(self) -> Iterator[Array]:
        """The entries along the first axis, one after the other."""

    def whole(self) -> Array:
        """All of it."""


@dataclass(frozen=True, eq=False)
class ArrayInMemory:
    """An array that is already there."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    def rows(self) -> Iterator[Array]:
        yield from self.array

    def whole(self) -> Array:
        return self.array


@dataclass(frozen=True)
class NpyFile:
    """A ``.npy`` file, mapped into memory while it is read."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def rows(self) -> Iterator[Array]:
        yield from self._mapped()

    def whole(self) -> Array:
        return np.array(self._mapped())

    def _mapped(self) -> Array:
        with reading(self.path):
            mapped: Array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return mapped


@dataclass(frozen=True)
class NpzMember:
    """One array of a ``.npz`` file, decompressed as far as it has been asked for."""

    path: Path
    member: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran_order: bool

    def rows(self) -> Iterator[Array]:
        if self.fortran_order:  # Its rows are spread over the whole member.
            yield from self.whole()
            return
        row_shape = self.shape[1:]
        row_bytes = self.dtype.itemsize * int(np.prod(row_shape, dtype=np.int64))
        with reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            _read_header(stream)
            for _ in range(self.shape[0]):
                yield np.frombuffer(_read_exactly(stream, row_bytes), self.dtype).reshape(row_shape)
            if stream.read(1):  # Reading past the end also makes zipfile check the checksum.
                raise ValueError(f"array {self.member} is longer than its header says")

    def whole(self) -> Array:
        with reading(self.path), zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
            return array


def open_npy(path: Path) -> NpyFile:
    """A ``.npy`` file by its header.

    Raises:
        DataError: the file is missing, damaged, or holds Python objects.
    """
    with reading(path), path.open("rb") as stream:
        shape, _, dtype = _read_header(stream)
        _refuse_objects(path, path.name, dtype)
        expected = stream.tell() + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if path.stat().st_size < expected:
            raise EOFError(f"{path.stat().st_size} bytes instead of {expected}")
    return NpyFile(path, shape, dtype)


def open_npz(path: Path) -> dict[str, NpzMember]:
    """The arrays of a ``.npz`` file by their names and headers.

    Raises:
        DataError: the file is missing, damaged, or holds something else than arrays of numbers.
    """
    found = {}
    with reading(path), zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if not member.endswith(".npy"):
                raise ValueError(f"{member} is not an array; numpy.savez writes what is expected here")
            with archive.open(member) as stream:
                shape, fortran_order, dtype = _read_header(stream)
            name = member.removesuffix(".npy")
            _refuse_objects(path, name, dtype)
            found[name] = NpzMember(path, member, shape, dtype, fortran_order)
    return found


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Makes what goes wrong while a file is read a :class:`DataError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give a .npz or .npy file or a directory of them") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: damaged, or not a file written by numpy.save or numpy.savez ({reason})") from error


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype (numpy.lib.format, versions 1 and 2; version 3 has field names only)."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"array format {version[0]}.{version[1]} is not supported")
    return tuple(shape), bool(fortran_order), dtype


def _refuse_objects(path: Path, name: str, dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise DataError(f"{path}: {name} holds Python objects; save an array of numbers of equal shapes instead")


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError(f"the data ends {count - len(data)} bytes early")
    return data
