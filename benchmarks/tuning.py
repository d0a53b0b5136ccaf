"""What ``hquant tune`` gains: whole networks with the tiles that the model expects to be fastest, and with measured ones.

The untuned and the tuned artifact of a network run in processes of their own that take turns, at batch 1. Where a process has
its memory may change its times by some percent, so there are several pairs of processes: a time is the median of those of the
pairs, the gain follows from the median of the pairs' ratios.

    python -m benchmarks.tuning [--instruction-set avx2] [--precisions float32,a8w7] [--networks squeezenet] [--json out.json]

``--step prepare`` compiles and tunes, ``--step time`` times what stands in ``--folder``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.engine_models import NETWORKS, NetworkFiles, process_environment
from benchmarks.engines import TARGETS, Contestant, time_contestants
from benchmarks.machine import describe_machine
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.cli.tables import print_table
from tvm_hquant.plan import load_plan
from tvm_hquant.runtime import load_artifact
from tvm_hquant.tuning.bench import open_bench
from tvm_hquant.tuning.records import TuningRecord, append_records, read_records
from tvm_hquant.tuning.tiles import tune_tiles

_PRECISIONS = {"avx512-vnni": "a8w8", "avx2": "float32,a8w7"}


@dataclass(frozen=True)
class Gain:
    """A network in a precision: kernels that were measured and that got another tile, seconds of tuning, times in ms, and the
    ratio of each pair."""

    network: str
    precision: str
    kernels: int
    changed: int
    tuning_seconds: float
    untuned: float
    tuned: float
    ratios: tuple[float, ...]

    @property
    def gain(self) -> float:
        """The part of the untuned time that is saved."""
        return 1 - median(self.ratios)


@dataclass(frozen=True)
class TuningFiles:
    """Where the files of a network in a precision are."""

    network: NetworkFiles
    instruction_set: str
    precision: str

    @property
    def untuned(self) -> Path:
        return self.network.artifact(self.instruction_set, self.precision)

    @property
    def tuned(self) -> Path:
        return self.network.artifact(self.instruction_set, f"{self.precision}.tuned")

    @property
    def records(self) -> Path:
        return self.tuned.with_name(f"{self.tuned.name}.jsonl")

    @property
    def seconds(self) -> Path:
        return self.tuned.with_name(f"{self.tuned.name}.seconds")

    def prepare(self) -> None:
        """Compiles the network, tunes it, and compiles it with what was found."""
        self.network.make_float_model()
        if not self.untuned.exists():
            self.network.make_artifacts(self.instruction_set, TARGETS[self.instruction_set], (self.precision,))
        start = time.perf_counter()
        untuned = load_artifact(self.untuned)
        found = tune_tiles(untuned, open_bench(untuned))
        self.seconds.write_text(f"{time.perf_counter() - start:.1f}\n", encoding="utf-8")
        self.records.unlink(missing_ok=True)
        append_records(self.records, found)
        self.compile_tuned()

    def compile_tuned(self) -> None:
        """The tuned artifact, from the records."""
        session = api.open_session(str(self.network.float_model), TARGETS[self.instruction_set])
        plan = load_plan(self.untuned / "plan.json")
        tuned = compile_artifact(
            session.mod, plan, session.spec, name=self.network.name, tuning=read_records(self.records)
        )
        tuned.save(self.tuned)

    def time(self, visits: int, runs: int, pairs: int) -> Gain:
        """The two artifacts in turns, in each of some pairs of processes."""
        contestants = [
            Contestant(name, sys.executable, "tvm_hquant", path, process_environment())
            for name, path in (("untuned", self.untuned), ("tuned", self.tuned))
        ]
        found = [time_contestants(self.network, contestants, 1, visits, runs) for _ in range(pairs)]
        untuned, tuned = zip(*([timing.milliseconds for timing in pair] for pair in found), strict=True)
        records = [r for r in read_records(self.records) if isinstance(r, TuningRecord)]
        changed = sum(record.tile != record.expected for record in records)
        seconds = float(self.seconds.read_text(encoding="utf-8"))
        return Gain(
            self.network.name,
            self.precision,
            len(records),
            changed,
            seconds,
            median(untuned),
            median(tuned),
            tuple(t / u for u, t in zip(untuned, tuned, strict=True)),
        )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="squeezenet,mobilenetv2,resnet50")
    parser.add_argument("--instruction-set", choices=TARGETS, default="avx2")
    parser.add_argument("--precisions", help="by default a8w8 on avx512-vnni, float32 and a8w7 on avx2")
    parser.add_argument("--visits", type=int, default=3, help="how often each artifact has its turn")
    parser.add_argument("--runs", type=int, default=20, help="timed runs in a turn")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of processes")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hquant-engines")
    parser.add_argument("--step", choices=("all", "prepare", "time"), default="all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    precisions = (arguments.precisions or _PRECISIONS[arguments.instruction_set]).split(",")
    files = [
        TuningFiles(NetworkFiles(network, arguments.folder), arguments.instruction_set, precision)
        for network in arguments.networks.split(",")
        for precision in precisions
    ]
    if arguments.step != "time":
        for each in files:
            each.prepare()
    if arguments.step == "prepare":
        return
    gains = [each.time(arguments.visits, arguments.runs, arguments.pairs) for each in files]
    rows = [
        (
            NETWORKS[g.network], g.precision, f"{g.changed} of {g.kernels}", f"{g.tuning_seconds:.0f}",
            f"{g.untuned:.2f}", f"{g.tuned:.2f}", f"{g.gain:+.1%}",
        )
        for g in gains
    ]  # fmt: skip
    print_table(
        (arguments.instruction_set, "precision", "other tiles", "tuning, s", "untuned, ms", "tuned, ms", "gain"), rows
    )
    if arguments.json:
        document = {
            "machine": describe_machine(),
            "instruction_set": arguments.instruction_set,
            "gains": [{**asdict(g), "gain": g.gain} for g in gains],
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
