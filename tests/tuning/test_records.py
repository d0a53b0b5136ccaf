"""The file of tuning records, and families that follow it: a tile changes how fast a kernel is, never what it computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tvm import rpc

from tests.planned_models import host_spec, named_plan, one_sample, partitioned, shared_session, simulated
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.cpu_features import cpu_identity
from tvm_hquant.errors import TuningError
from tvm_hquant.kernels.interface import KernelRequest, Tile
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES, families_for_target
from tvm_hquant.operators import Conv2D, Window
from tvm_hquant.tuning.bench import open_bench
from tvm_hquant.tuning.records import (
    TunedFamily,
    TuningRecord,
    append_records,
    check_appendable,
    is_tiled,
    read_records,
    records_for,
    tuned_families,
)
from tvm_hquant.tuning.schedules import tune_schedules
from tvm_hquant.tuning.tiles import tune_tiles
from tvm_hquant.verification import verify_artifact

FAMILY = ANCHOR_FAMILIES["avx2"]
REQUEST = KernelRequest(Conv2D((1, 8, 12, 16), 32, Window((1, 1))), ("uint8",), "uint8", "int8")
FIRST, OTHER = FAMILY.tiles(REQUEST)[:2]
RECORD = TuningRecord(REQUEST, "avx2", "this", OTHER, 1.5, FIRST, 2.0)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Appended, in order; a file that does not exist holds none."""
    path = tmp_path / "tuned.jsonl"
    assert read_records(path) == ()
    append_records(path, [RECORD])
    append_records(path, [replace(RECORD, tile=FIRST)])
    assert read_records(path) == (RECORD, replace(RECORD, tile=FIRST))


def test_records_of_the_right_cpu(tmp_path: Path) -> None:
    """This machine's where it is the target, else the only ones; several others are not guessed at."""
    path = tmp_path / "tuned.jsonl"
    board = replace(RECORD, cpu="board")
    append_records(path, [RECORD, board])
    assert records_for(path, "this") == (RECORD,)
    with pytest.raises(TuningError, match="board, this"):
        records_for(path, None)
    single = tmp_path / "board.jsonl"
    append_records(single, [board])
    assert records_for(single, "this") == records_for(single, None) == (board,)
    with pytest.raises(TuningError, match="no tuning records"):
        records_for(tmp_path / "none.jsonl", "this")


def test_a_check_leaves_files_as_they_are(tmp_path: Path) -> None:
    """What is asked before hours of work says that records can be added, and leaves none or the earlier ones."""
    path = tmp_path / "tuned.jsonl"
    check_appendable(path)
    append_records(path, [])
    assert not path.exists()
    append_records(path, [RECORD])
    check_appendable(path)
    assert read_records(path) == (RECORD,)
    for wrong in (tmp_path, tmp_path / "none" / "tuned.jsonl"):
        with pytest.raises(TuningError, match="cannot"):
            check_appendable(wrong)


def test_damaged_line_is_named(tmp_path: Path) -> None:
    """With its number, so that a person can remove it."""
    path = tmp_path / "tuned.jsonl"
    append_records(path, [RECORD])
    path.write_text(path.read_text() + '{"version": 99}\n')
    with pytest.raises(TuningError, match=r"line 2.*version 99"):
        read_records(path)


def test_family_follows_the_last_record() -> None:
    """Another request keeps the family's own choice; so does a tile that the family does not have."""
    (tuned,) = tuned_families([FAMILY], [replace(RECORD, tile=FIRST), RECORD])
    assert isinstance(tuned, TunedFamily)
    assert tuned.kernel(REQUEST).name == FAMILY.kernel(REQUEST, OTHER).name != FAMILY.kernel(REQUEST).name
    unmeasured = replace(REQUEST, operator=replace(REQUEST.operator, out_channels=48))
    assert tuned.kernel(unmeasured).name == FAMILY.kernel(unmeasured).name
    (outdated,) = tuned_families([FAMILY], [replace(RECORD, tile=Tile(99, 9))])
    assert outdated.kernel(REQUEST).name == FAMILY.kernel(REQUEST).name
    assert tuned_families([FAMILY], [replace(RECORD, family="avx512_vnni")]) == (FAMILY,)


def test_functions_are_measured_over_rpc() -> None:
    """A server has several libraries of one network loaded at once; records name the target, not the machine that asks."""
    model, spec = "branches", host_spec()
    artifact = compile_artifact(partitioned(model), named_plan(model, "a8w8"), spec)
    server = rpc.Server("127.0.0.1", port=19300, port_end=19500, silent=True)
    try:
        bench = open_bench(artifact, f"127.0.0.1:{server.port}")
        measured = tune_tiles(artifact, bench, candidates=2, repeat=1)
        (scheduled,), _ = tune_schedules(artifact, bench, count=2, repeat=1)
    finally:
        server.terminate()
    assert len(measured) > 1
    assert scheduled.name == "power"
    assert all(record.cpu == spec.name for record in (*measured, scheduled))


@pytest.mark.parametrize("plan", ["a8w8", "float32"])
def test_tuned_network_computes_the_same_bits(plan: str) -> None:
    """Every kernel with the tile that is expected to be the slowest gives what the simulator gives without any records."""
    model = "branches"
    session, spec = shared_session(model), host_spec()
    untuned = compile_artifact(partitioned(model), named_plan(model, plan), spec)
    measured = tune_tiles(untuned, open_bench(untuned), candidates=2, repeat=1)
    assert measured
    assert all(record.cpu == cpu_identity() for record in measured)
    tiled = {f.name: f for f in families_for_target(spec.instruction_sets) if is_tiled(f)}
    records = [replace(r, tile=tiled[r.family].tiles(r.request)[-1]) for r in measured]
    assert all(r.tile != r.expected for r in records)
    artifact = compile_artifact(partitioned(model), named_plan(model, plan), spec, tuning=records)
    kernels = [{layer["kernel"] for layer in a.manifest["layers"]} for a in (untuned, artifact)]
    assert kernels[0] != kernels[1]
    outputs = artifact.run(one_sample(session)).values()
    assert all(np.array_equal(a, b) for a, b in zip(outputs, simulated(model, plan), strict=True))
    assert verify_artifact(artifact, [one_sample(session)]).holds
