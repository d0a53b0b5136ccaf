"""The database of tuning: JSON lines, one for each measured kernel, appended and never changed.

A line names what was measured (the kernel's request), with which kernel family, on which CPU, and which tile was fastest. A
later line for the same three replaces an earlier one. A tile decides how fast a kernel is, never what it computes.
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


def read_records(path: Path) -> tuple[TuningRecord, ...]:
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


def append_records(path: Path, records: Iterable[TuningRecord]) -> None:
    """Adds records to a file, which is made if it does not exist.

    Raises:
        TuningError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(record.to_jsonable())}\n" for record in records)
    except OSError as error:
        raise TuningError(f"cannot write the tuning records {path}: {error.strerror or error}") from None


def record_from_jsonable(document: Mapping[str, Any]) -> TuningRecord:
    """The inverse of :meth:`TuningRecord.to_jsonable`.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is no record of this version.
    """
    fields = dict(document)
    version = fields.pop("version")
    if version != RECORDS_VERSION:
        raise ValueError(f"version {version!r}, this release reads {RECORDS_VERSION}")
    request = from_jsonable(fields.pop("request"))
    for name in ("tile", "expected"):
        fields[name] = Tile(*map(int, fields[name]))
    return TuningRecord(request, **fields)


def _from_line(path: Path, number: int, line: str) -> TuningRecord:
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
        """The kernel with the measured tile, wherever its output goes; a tile that the family has no more is passed over."""
        tile = self.tiles.get(replace(request, placement=None, overwritten=None))
        return self.base.kernel(request, tile if tile is not None and tile in self.base.tiles(request) else None)


def tuned_families(families: Sequence[KernelFamily], records: Sequence[TuningRecord]) -> tuple[KernelFamily, ...]:
    """The families of a target with what was measured on its CPU (:func:`records_for`)."""
    chosen: dict[str, dict[KernelRequest, Tile]] = {}
    for record in records:
        chosen.setdefault(record.family, {})[record.request] = record.tile
    return tuple(
        TunedFamily(family, chosen[family.name]) if is_tiled(family) and family.name in chosen else family
        for family in families
    )


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


def records_for(path: Path, here: str | None) -> tuple[TuningRecord, ...]:
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
