"""The database of tuning: JSON lines, one for each measured function, appended and never changed.

There are two kinds of lines. One names a kernel of this project (its request), its family, the CPU, and which tile was
fastest. The other names a function that TVM made of an operator without such a kernel, the CPU, and the trace of the fastest
schedule. A later line for the same function on the same CPU replaces an earlier one. Tiles and schedules decide how fast a
function is, never what it computes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from tvm_hquant.errors import ArtifactError, TuningError
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest, Tile, TiledFamily
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.operator_codec import from_jsonable, to_jsonable
from tvm_hquant.target_spec import TargetSpec

RECORDS_VERSION = 1


@dataclass(frozen=True)
class TuningRecord:
    """The fastest tile for one request.

    Attributes:
        request: what the kernel computes.
        family: name of the kernel family.
        cpu: of the machine that measured (:func:`tvm_hquant.cpu_features.cpu_identity`), or the name of the target behind RPC.
        tile: the fastest.
        microseconds: its median time.
        expected, expected_microseconds: the tile that the family would take untuned, and its median time.
    """

    request: KernelRequest
    family: str
    cpu: str
    tile: Tile
    microseconds: float
    expected: Tile
    expected_microseconds: float

    def to_jsonable(self) -> dict[str, Any]:
        """The record as plain data."""
        return {
            **vars(self),
            "version": RECORDS_VERSION,
            "request": to_jsonable(self.request),
            "tile": [self.tile.pixels, self.tile.vectors],
            "expected": [self.expected.pixels, self.expected.vectors],
        }


@dataclass(frozen=True)
class ScheduleRecord:
    """The fastest schedule for a function that TVM made.

    Attributes:
        function: its digest (:func:`tvm_hquant.opaque_functions.function_digest`).
        name: what TVM calls it.
        cpu: as in :class:`TuningRecord`.
        trace: of the fastest schedule (:mod:`tvm_hquant.passes.apply_schedules`); empty where TVM's own loops are.
        microseconds: its median time.
        expected_microseconds: that of TVM's own loops.
    """

    function: str
    name: str
    cpu: str
    trace: str
    microseconds: float
    expected_microseconds: float

    def to_jsonable(self) -> dict[str, Any]:
        """The record as plain data."""
        return {**vars(self), "version": RECORDS_VERSION}


Record = TuningRecord | ScheduleRecord


def read_records(path: Path) -> tuple[Record, ...]:
    """All records of a file, in order; none of one that does not exist yet.

    Raises:
        TuningError: the file cannot be read, or a line is no record of this version.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise TuningError(
            f"cannot read the tuning records {path}: {getattr(error, 'strerror', None) or error}"
        ) from None
    return tuple(_from_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip())


def check_appendable(path: Path) -> None:
    """Makes sure that records can be added to a file, and leaves what is there: the file as it is, or none.

    Raises:
        TuningError: it cannot be written, or holds something else than records.
    """
    read_records(path)
    existed = path.exists()
    _append(path, "")
    if not existed:
        path.unlink()


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Adds records to a file, which is made for the first one.

    Raises:
        TuningError: it cannot be written.
    """
    if text := "".join(f"{json.dumps(record.to_jsonable())}\n" for record in records):
        _append(path, text)


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise TuningError(f"cannot write the tuning records {path}: {error.strerror or error}") from None


def record_from_jsonable(document: Mapping[str, Any]) -> Record:
    """The inverse of ``to_jsonable`` of both kinds.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no record of this version.
    """
    fields = dict(document)
    version = fields.pop("version")
    if version != RECORDS_VERSION:
        raise ValueError(f"version {version!r}, this release reads {RECORDS_VERSION}")
    if "trace" in fields:
        return ScheduleRecord(**fields)
    request = from_jsonable(fields.pop("request"))
    for name in ("tile", "expected"):
        fields[name] = Tile(*map(int, fields[name]))
    return TuningRecord(request, **fields)


def _from_line(path: Path, number: int, line: str) -> Record:
    try:
        return record_from_jsonable(json.loads(line))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuningError(
            f"{path}, line {number}, is no tuning record: {error}; remove the line and tune again"
        ) from None


@dataclass(frozen=True, eq=False)
class TunedFamily:
    """A family that takes measured tiles where there are some, and its own choice elsewhere."""

    base: TiledFamily
    tiles: Mapping[KernelRequest, Tile]

    @property
    def name(self) -> str:
        return self.base.name

    def kernel(self, request: KernelRequest) -> Kernel | None:
        """The kernel with the measured tile, wherever activations come from and the output goes.

        A tile that the family has no more is passed over.
        """
        plain = replace(request, placement=None, overwritten=None, sources=(), interleaved=None)
        tile = self.tiles.get(plain)
        return self.base.kernel(request, tile if tile is not None and tile in self.base.tiles(request) else None)


def tuned_families(families: Sequence[KernelFamily], records: Sequence[Record]) -> tuple[KernelFamily, ...]:
    """The families of a target with what was measured on its CPU (:func:`records_for`)."""
    chosen: dict[str, dict[KernelRequest, Tile]] = {}
    for record in records:
        if isinstance(record, TuningRecord):
            chosen.setdefault(record.family, {})[record.request] = record.tile
    return tuple(
        TunedFamily(family, chosen[family.name]) if is_tiled(family) and family.name in chosen else family
        for family in families
    )


def measured_traces(records: Sequence[Record]) -> dict[str, str]:
    """The trace of each function whose schedule was measured, by the function's digest; empty for TVM's own loops."""
    return {record.function: record.trace for record in records if isinstance(record, ScheduleRecord)}


def families_of_manifest(manifest: Mapping[str, Any], spec: TargetSpec) -> tuple[KernelFamily, ...]:
    """The kernel families that an artifact was compiled with for a spec, its measured tiles included.

    Raises:
        ArtifactError: the records in the manifest are damaged.
    """
    try:
        tuning = [record_from_jsonable(entry) for entry in manifest.get("tuning", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"the tuning records of manifest.json are damaged ({error}); compile the model again"
        ) from None
    return tuned_families(families_for_target(spec.instruction_sets, spec.processor), tuning)


def is_tiled(family: KernelFamily | TiledFamily) -> TypeGuard[TiledFamily]:
    """Whether a family has a choice of tiles (:class:`TiledFamily`)."""
    return hasattr(family, "tiles")


def records_for(path: Path, here: str | None) -> tuple[Record, ...]:
    """The records of a file for the target's CPU: for this machine's, if it is the target, else for the only one in the file.

    Args:
        here: identity of this machine's CPU if the target runs on it.

    Raises:
        TuningError: the file cannot be read, or has records of several CPUs, or of none.
    """
    records = read_records(path)
    known = sorted({record.cpu for record in records})
    if here in known or len(known) == 1:
        cpu = here if here in known else known[0]
        return tuple(record for record in records if record.cpu == cpu)
    if not known:
        raise TuningError(f"{path} holds no tuning records: 'hquant tune ARTIFACT --records {path}' makes some")
    raise TuningError(
        f"{path} holds records of several CPUs ({', '.join(known)}), none of them this machine's: keep those of the "
        "target's CPU in a file of their own"
    )
