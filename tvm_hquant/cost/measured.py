"""Times of layers as the target's kernels take them on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tvm

from tvm_hquant.atomic_file import write_at_once
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.errors import JournalError
from tvm_hquant.precision import FLOAT32, parse_precision
from tvm_hquant.search.problem import LayerPrecision
from tvm_hquant.session import QuantizationSession

_FASTEST_CORES = 1
"""``ThreadGroup::kBig``, the affinity with which TVM starts its thread pool (src/runtime/threading_backend.h)."""


def measure_layer_times(
    session: QuantizationSession, candidates: Mapping[str, tuple[str, ...]], sample: Sample
) -> dict[LayerPrecision, float]:
    """Median microseconds, on one core, of every layer's kernel in every precision that it may have, on one sample's values.

    Conversions and layers without weights, which are predicted, are those of one core too. Each precision is timed in a network
    that has it wherever it may be, so that formats around a layer are those of its precision.
    """
    times: dict[LayerPrecision, float] = {}
    for name in dict.fromkeys(p for precisions in candidates.values() for p in precisions):
        wanted = {
            layer: parse_precision(name) if name in precisions else FLOAT32 for layer, precisions in candidates.items()
        }
        with _one_thread():
            found = session.target_engine.time_layers(sample.inputs, session.program(wanted))
        times.update({(layer, name): found[layer] for layer, ps in candidates.items() if name in ps and layer in found})
    return times


@contextmanager
def _one_thread() -> Iterator[None]:
    """Kernels run in one thread meanwhile, however many TVM's pool has."""
    configure = tvm.get_global_func("runtime.config_threadpool")
    threads = int(tvm.get_global_func("runtime.NumThreads")())
    configure(_FASTEST_CORES, 1)
    try:
        yield
    finally:
        configure(_FASTEST_CORES, threads)


@dataclass(frozen=True)
class LayerTimes:
    """Microseconds of layers in precisions, and the clocks, GHz, that units had then: what is predicted beside measured times
    is for these."""

    microseconds: Mapping[LayerPrecision, float]
    clocks_ghz: Mapping[str, float]


def remembered_layer_times(
    path: Path, session: QuantizationSession, candidates: Mapping[str, tuple[str, ...]], sample: Sample
) -> LayerTimes:
    """The same, measured once: kept in a file, so that a search that goes on has the same times and finds the same plans.

    Times of another model or target are measured anew.

    Raises:
        JournalError: the file is something else.
    """
    owner = {"model": session.graph.fingerprint, "target": session.spec.spec_hash()}
    wanted = {(layer, p) for layer, precisions in candidates.items() for p in precisions}
    if path.is_file():
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            times = {(layer, p): float(t) for layer, own in document["microseconds"].items() for p, t in own.items()}
            if {key: document.get(key) for key in owner} == owner and wanted <= times.keys():
                return LayerTimes(times, {name: float(clock) for name, clock in document["clocks_ghz"].items()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(f"{path} does not hold times of layers ({error}); remove it") from None
    clocks = {unit.name: unit.clock_ghz for unit in session.spec.units}
    times = measure_layer_times(session, candidates, sample)
    table: dict[str, dict[str, float]] = {}
    for (layer, precision), microseconds in times.items():
        table.setdefault(layer, {})[precision] = microseconds
    write_at_once(path, json.dumps({**owner, "clocks_ghz": clocks, "microseconds": table}, indent=1) + "\n")
    return LayerTimes(times, clocks)
