"""Times of layers: protects that those of one core are taken, and that none is used for another model or target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tvm

from tests.planned_models import one_sample, shared_session
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.cost import measured
from tvm_hquant.cost.measured import measure_layer_times, remembered_layer_times
from tvm_hquant.errors import JournalError
from tvm_hquant.session import QuantizationSession
from tvm_hquant.target_spec import load_target_spec


def candidates(session: QuantizationSession) -> dict[str, tuple[str, ...]]:
    """Every layer may have these."""
    return {layer.name: ("a8w8", "float32") for layer in session.graph.anchors}


def test_layers_are_timed_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted times, which they are added to, are those of one core. The pool is as before afterwards."""
    session = shared_session("branches")
    threads = tvm.get_global_func("runtime.NumThreads")
    before, seen = threads(), set()
    own = type(session.target_engine).time_layers

    def watch(*arguments: Any) -> Mapping[str, float]:
        seen.add(threads())
        return own(*arguments)

    monkeypatch.setattr(type(session.target_engine), "time_layers", watch)
    times = measure_layer_times(session, candidates(session), Sample(one_sample(session)))
    assert seen == {1}
    assert threads() == before
    assert times.keys() == {(layer, p) for layer, ps in candidates(session).items() for p in ps}
    assert all(time > 0 for time in times.values())


def test_times_are_measured_once_for_a_model_and_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that goes on has the same times; one for another target in the same folder has its own."""
    session, path = shared_session("branches"), tmp_path / "layer_times.json"
    asked: list[str] = []

    def measure(session: QuantizationSession, own: Mapping[str, tuple[str, ...]], _sample: Sample) -> Any:
        asked.append(session.spec.name)
        return {(layer, p): float(len(asked)) for layer, ps in own.items() for p in ps}

    monkeypatch.setattr(measured, "measure_layer_times", measure)
    sample = Sample(one_sample(session))
    first = remembered_layer_times(path, session, candidates(session), sample)
    faster = session.spec.at_clocks({unit.name: 2 * unit.clock_ghz for unit in session.spec.units})
    again = QuantizationSession(session.mod, faster, session.engine.families, session.engine.target)
    assert remembered_layer_times(path, again, candidates(session), sample) == first
    assert faster.at_clocks(first.clocks_ghz) == session.spec, "what is predicted beside them is the same, too"
    other = QuantizationSession(
        session.mod, load_target_spec("cortex-a76"), session.engine.families, session.engine.target
    )
    assert remembered_layer_times(path, other, candidates(session), sample) != first
    assert asked == [session.spec.name, "cortex-a76"]
    path.write_text('{"microseconds": 3}')
    with pytest.raises(JournalError, match="layer_times"):
        remembered_layer_times(path, session, candidates(session), sample)
