"""Evaluations are made once and written down: protects that what the journal gives is what a new evaluation would."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.planned_models import partitioned, random_samples, shared_session
from tvm_hquant.calibration.data import open_data
from tvm_hquant.calibration.samples import DataSource, Sample
from tvm_hquant.errors import JournalError, ToolchainError
from tvm_hquant.precision import FLOAT32, parse_precision
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.evaluator import CHUNK, ProgramEvaluator
from tvm_hquant.simulator.journal import EvaluationJournal
from tvm_hquant.simulator.metrics import METRICS, MetricAccumulator
from tvm_hquant.simulator.program import Program
from tvm_hquant.simulator.runner import local_executor

METRIC_LIST = [METRICS["mse"], METRICS["kl"]]


def source_of(session: QuantizationSession, count: int, seed: int = 3) -> DataSource:
    """Random samples."""
    return open_data(random_samples(session, count, seed=seed), session.signature)


def candidates(session: QuantizationSession) -> list[Program]:
    """Each layer alone in 8 bits."""
    floats = {layer.name: FLOAT32 for layer in session.graph.anchors}
    return [session.program({**floats, name: parse_precision("a8w8")}) for name in floats]


def evaluator(session: QuantizationSession, path: Path | None = None) -> ProgramEvaluator:
    """One that has seen nothing yet."""
    journal = None if path is None else EvaluationJournal(path, session.graph.fingerprint)
    return ProgramEvaluator(session.engine, session.float_program, journal)


def tables(scores: Sequence[Sequence[MetricAccumulator]]) -> list[list[tuple[tuple[float, float], ...]]]:
    """All numbers of all scores."""
    return [[tuple(tuple(s) for s in metric.scores) for metric in of_program] for of_program in scores]


class InterruptedWalkError(Exception):
    """Stands for a kill."""


class BreakingSource:
    """Gives some samples, then dies, the first time that it is walked through after ``walks`` walks."""

    def __init__(self, source: DataSource, after: int, walks: int) -> None:
        self.source, self.after, self.walks = source, after, walks
        self.name, self.count, self.has_labels = source.name, source.count, source.has_labels

    def __iter__(self) -> Iterator[Sample]:
        self.walks -= 1
        for number, sample in enumerate(self.source):
            if self.walks < 0 and number == self.after:
                raise InterruptedWalkError
            yield sample


def test_journal_gives_what_was_measured(tmp_path: Path) -> None:
    """A second search in another process finds every score, to the bit, and runs nothing."""
    session = shared_session("branches")
    data, programs = source_of(session, CHUNK + 3), candidates(session)
    plain = tables(evaluator(session).scores(programs, data, METRIC_LIST, ""))
    first, second = (evaluator(session, tmp_path / "journal.sqlite") for _ in range(2))
    assert tables(first.scores(programs, data, METRIC_LIST, "")) == plain
    assert first.evaluations == len(programs)
    again = source_of(session, CHUNK + 3)
    assert tables(second.scores(programs[::-1], again, METRIC_LIST, "")) == plain[::-1]
    assert second.evaluations == 0


def test_killed_evaluation_goes_on(tmp_path: Path) -> None:
    """What was done before the kill is not done again, and nothing of it is lost or counted twice."""
    session = shared_session("branches")
    data, programs = source_of(session, 2 * CHUNK), candidates(session)
    plain = tables(evaluator(session).scores(programs, data, METRIC_LIST, ""))
    path = tmp_path / "journal.sqlite"
    with pytest.raises(InterruptedWalkError):
        evaluator(session, path).scores(programs, BreakingSource(data, CHUNK + 2, 1), METRIC_LIST, "")
    resumed = evaluator(session, path)
    done = []

    def watch(_description: str, items: Iterator[None], _count: int | None) -> Iterator[None]:
        for item in items:
            done.append(item)
            yield item

    resumed._progress = watch
    assert tables(resumed.scores(programs, data, METRIC_LIST, "")) == plain
    assert len(done) == CHUNK, "the first chunk was not run again"


def test_other_samples_plans_and_metrics_are_not_mixed_up(tmp_path: Path) -> None:
    """Each of them is part of what a score is found by."""
    session = shared_session("branches")
    programs = candidates(session)[:2]
    path = tmp_path / "journal.sqlite"
    used = evaluator(session, path)
    used.scores(programs[:1], source_of(session, 4), METRIC_LIST[:1], "")
    for data, metrics in ((source_of(session, 4, seed=5), METRIC_LIST[:1]), (source_of(session, 4), METRIC_LIST)):
        expected = tables(evaluator(session).scores(programs, data, metrics, ""))
        assert tables(evaluator(session, path).scores(programs, data, metrics, "")) == expected
    other = QuantizationSession(partitioned("residual"), session.spec, session.engine.families, session.engine.target)
    assert (
        EvaluationJournal(path, other.graph.fingerprint).find(
            used._digests(next(iter(used._known.values())))[0], [p.digest for p in programs], ["mse"]
        )
        == {}
    )


def test_equal_programs_run_once() -> None:
    """Asking for one plan twice costs one evaluation."""
    session = shared_session("branches")
    programs = candidates(session)
    counted = evaluator(session)
    scores = counted.scores([*programs, *programs], source_of(session, 2), METRIC_LIST[:1], "")
    assert counted.evaluations == len(programs)
    assert tables(scores[: len(programs)]) == tables(scores[len(programs) :])


def test_scores_do_not_depend_on_what_is_evaluated_together() -> None:
    """Values are shared among programs, buffers reused: each program still scores what it scores alone."""
    session = shared_session("residual")
    data, programs = source_of(session, 3), candidates(session)
    together = tables(evaluator(session).scores(programs, data, METRIC_LIST, ""))
    for program, scores in zip(programs, together, strict=True):
        assert tables(evaluator(session).scores([program], data, METRIC_LIST, "")) == [scores]


def test_something_else_is_no_journal(tmp_path: Path) -> None:
    """A file of another kind is left alone, and the message says which."""
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, and not a database at all" * 10)
    with pytest.raises(JournalError, match=r"notes\.txt"):
        EvaluationJournal(path, "model")
    assert path.read_text().startswith("these are my notes")


def _other_program(database: sqlite3.Connection) -> None:
    database.execute("CREATE TABLE kernels (ir TEXT)")


def _other_columns(database: sqlite3.Connection) -> None:
    database.execute("CREATE TABLE scores (player TEXT, points INTEGER)")


def _other_version(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA user_version = 7")


@pytest.mark.parametrize("make", [_other_program, _other_columns, _other_version])
def test_another_database_is_no_journal(tmp_path: Path, make: Callable[[sqlite3.Connection], None]) -> None:
    """A database of another program, or of another release, is refused by its name, and nothing is written into it."""
    path = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        make(database)
    before = path.read_bytes()
    with pytest.raises(JournalError, match=r"other\.sqlite .*: give another file"):
        EvaluationJournal(path, "model")
    assert path.read_bytes() == before


def test_a_journal_that_breaks_is_named(tmp_path: Path) -> None:
    """A file that is damaged or taken away during a search ends it with one sentence, not with SQLite's traceback."""
    path = tmp_path / "journal.sqlite"
    journal = EvaluationJournal(path, "model")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE scores")
    with pytest.raises(JournalError, match=r"journal\.sqlite"):
        journal.find("samples", ["program"], ["kl"])
    with pytest.raises(JournalError, match=r"journal\.sqlite"):
        journal.add({("samples", "program", "kl"): np.zeros((1, 2))})


def test_digests_are_the_same_in_every_process() -> None:
    """Journals are found again: the hash of a program depends on nothing but what it computes."""
    session = shared_session("branches")
    again = QuantizationSession(session.mod, session.spec, session.engine.families, session.engine.target)
    assert again.float_program.digest == session.float_program.digest
    assert len({p.digest for p in [session.float_program, *candidates(session)]}) == 1 + len(session.graph.anchors)
    assert np.array_equal([s.key for s in again.float_program.steps], [s.key for s in session.float_program.steps])


def test_worker_processes_give_the_same_bits(tmp_path: Path) -> None:
    """Kernels are compiled, linked and run elsewhere, with constants that were sent: every score is the one made here."""
    session = shared_session("branches")
    data, programs = source_of(session, CHUNK + 3), candidates(session)
    plain = tables(evaluator(session).scores(programs, data, METRIC_LIST, ""))
    executor, count = local_executor(2)
    with executor:
        elsewhere = evaluator(session, tmp_path / "journal.sqlite")
        elsewhere.use_executor(executor, count)
        assert tables(elsewhere.scores(programs[:2], data, METRIC_LIST, "")) == plain[:2]
        assert tables(elsewhere.scores(programs, data, METRIC_LIST, "")) == plain
        assert elsewhere.evaluations == len(programs)


def test_a_worker_that_was_killed_is_reported(tmp_path: Path) -> None:
    """One sentence that says what to do, and the next search goes on from what was scored before."""
    session = shared_session("branches")
    data, programs = source_of(session, 2), candidates(session)
    path = tmp_path / "journal.sqlite"
    evaluator(session, path).scores(programs[:2], data, METRIC_LIST, "")
    executor, count = local_executor(2)
    with executor:
        broken = evaluator(session, path)
        broken.use_executor(executor, count)
        with pytest.raises(BrokenExecutor):
            executor.submit(os._exit, 1).result()
        with pytest.raises(ToolchainError, match="start again"):
            broken.scores(programs, data, METRIC_LIST, "")
    again = evaluator(session, path)
    again.scores(programs, data, METRIC_LIST, "")
    assert again.evaluations == len(programs) - 2


def test_cluster_gives_the_same_bits() -> None:
    """The same through dask.distributed's executor, with two workers that share nothing with this process."""
    distributed = pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")
    session = shared_session("branches")
    data, programs = source_of(session, CHUNK + 3), candidates(session)
    plain = tables(evaluator(session).scores(programs, data, METRIC_LIST, ""))
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        elsewhere = evaluator(session)
        elsewhere.use_executor(client.get_executor(), 2)
        assert tables(elsewhere.scores(programs, data, METRIC_LIST, "")) == plain
