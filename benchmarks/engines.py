"""Whole networks beside ONNX Runtime and OpenVINO: milliseconds a sample at batch 1, and our ratio to the fastest of them.

Every engine runs each network in a process of its own, at its best setting; the processes take turns, so that what the
machine does besides hits all alike. A figure is the median of all runs. Times on fewer than all instructions of this machine
(``--instruction-set avx2`` on one with AVX-512): our target is ``x86-64-avx2``; OpenVINO gets ``ONEDNN_MAX_CPU_ISA=AVX2``; and
both others load a copy of their libraries that sees no AVX-512 (``avx512_masking.py``).

    pip install -e '.[test,engines,benchmarks]'
    python -m benchmarks.engines [--instruction-set avx2] [--networks resnet50,squeezenet] [--threads 2] [--folder FOLDER]
    python -m benchmarks.engines --model mine.onnx [--calibration samples.npz] [--input-shapes "input:[1,3,224,224]"]

``--model`` compares ONNX files of your own instead of the five networks. All engines calibrate with the first 16 samples of
``--calibration`` and are timed with the first one; without, with one sample of random values: what the scales are makes no
engine faster or slower. ``--precisions`` says what of ours is measured.

The table is printed; ``--json`` (``engines.INSTRUCTION_SET.json`` in ``--folder``, unless named) holds every run and the
machine's description; ``--roofline`` (``roofline.INSTRUCTION_SET.svg`` there) shows every kernel of our networks in 8 bits,
with 7-bit weights on AVX2, under the roofline of the target. The other engines may be installed elsewhere:
``--engines-python /path/to/python``. ``--step prepare`` makes the models of every engine in ``--folder`` and times nothing;
``--step time`` times what stands there.

The column "core shared" says for what part of the time something outside used the same core (``core_probe.py``): the busiest
code suffers most from it, so quote a pass that has little, and choose it by this column alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.avx512_masking import without_avx512
from benchmarks.core_probe import core_probe, shared_part
from benchmarks.engine_models import (
    NETWORKS,
    PROCESS,
    NetworkFiles,
    available_networks,
    network_title,
    process_environment,
    run_process,
)
from benchmarks.machine import describe_machine
from benchmarks.own_model import OwnModel
from benchmarks.roofline_plot import draw, require_matplotlib
from tvm_hquant.cli.arguments import parse_input_shapes
from tvm_hquant.cli.tables import print_table
from tvm_hquant.cpu_features import cpu_features
from tvm_hquant.errors import HQuantError

TARGETS = {"avx512-vnni": "host", "avx2": "x86-64-avx2"}
PRECISIONS = {
    "avx512-vnni": ("float32", "bfloat16", "a8w8"),
    "avx2": ("float32", "a8w8", "a8w7", "a8w4"),
}
"""What of ours is measured unless ``--precisions`` says so, by instruction set."""

DRAWN = {"avx512-vnni": "a8w8", "avx2": "a8w7"}
"""What of ours the roofline plot shows, by instruction set, if it is measured."""

OTHERS = ("ONNX Runtime float32", "ONNX Runtime u8s8", "ONNX Runtime s8s8", "OpenVINO float32", "OpenVINO int8")


@dataclass(frozen=True)
class Contestant:
    """An engine with one form of a network: how its process is started."""

    name: str
    python: str
    engine: str
    model: Path
    environment: dict[str, str]

    @property
    def is_float32(self) -> bool:
        return self.name.endswith("float32")


@dataclass(frozen=True)
class Timing:
    """Seconds of every run, one list for each visit."""

    network: str
    contestant: str
    visits: tuple[tuple[float, ...], ...]

    @property
    def milliseconds(self) -> float:
        """The median of all runs."""
        return 1e3 * median(s for visit in self.visits for s in visit)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", help=f"with commas between: {', '.join(NETWORKS)}; all, unless --model is given")
    parser.add_argument("--model", type=Path, action="append", default=[], help="an ONNX file; may be given again")
    parser.add_argument("--calibration", type=Path, help="samples for --model, as 'hquant compile' takes them")
    parser.add_argument("--input-shapes", help="of --model, as 'hquant compile' takes them")
    parser.add_argument("--instruction-set", choices=TARGETS, default=_best_instruction_set())
    parser.add_argument("--precisions", help="of ours, with commas between")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--visits", type=int, default=12, help="how often each engine has its turn")
    parser.add_argument("--runs", type=int, default=5, help="timed runs in a turn")
    parser.add_argument("--engines-python", default=sys.executable, help="the Python that has the other engines")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hquant-engines")
    parser.add_argument("--step", choices=("all", "prepare", "time"), default="all")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--roofline", type=Path)
    arguments = parser.parse_args()
    if arguments.step != "prepare":
        require_matplotlib()
    instruction_set, engines_python = arguments.instruction_set, arguments.engines_python
    precisions = tuple(arguments.precisions.split(",")) if arguments.precisions else PRECISIONS[instruction_set]
    try:
        networks = _networks(arguments)
        if arguments.step != "time":
            for network in networks:
                prepare(network, instruction_set, precisions, engines_python)
    except HQuantError as error:
        raise SystemExit(str(error)) from None
    if arguments.step == "prepare":
        return
    timings: list[Timing] = []
    probes: dict[str, list[float]] = {}
    probe = core_probe(arguments.folder, arguments.threads)
    for network in networks:
        contestants = contestants_for(network, instruction_set, precisions, engines_python)
        between_turns = partial(_keep_probes, probe, probes.setdefault(network.name, []))
        timings += time_contestants(
            network, contestants, arguments.threads, arguments.visits, arguments.runs, between_turns
        )
        print_timings(timings[-len(contestants) :], probes)
    if len(networks) > 1:
        print_timings(timings, probes)
    results = arguments.json or arguments.folder / f"engines.{arguments.instruction_set}.json"
    results.write_text(json.dumps(_document(arguments, timings, probes), indent=1) + "\n", encoding="utf-8")
    picture = arguments.roofline or arguments.folder / f"roofline.{arguments.instruction_set}.svg"
    drawn = DRAWN[instruction_set] if DRAWN[instruction_set] in precisions else precisions[0]
    draw_roofline(networks, instruction_set, drawn, arguments.threads, picture)
    print(f"every run: {results}\nroofline plot: {picture}")


def _networks(arguments: argparse.Namespace) -> list[NetworkFiles]:
    """Those that are asked for: of ours, then models of the user's own."""
    models: list[Path] = arguments.model
    names = arguments.networks.split(",") if arguments.networks else () if models else available_networks()
    if unknown := set(names) - set(NETWORKS):
        raise SystemExit(f"unknown networks {', '.join(sorted(unknown))}: use {', '.join(NETWORKS)}")
    if len(models) != 1 and (arguments.calibration or arguments.input_shapes):
        raise SystemExit("--calibration and --input-shapes are for one --model: compare the models one after the other")
    shapes = parse_input_shapes(arguments.input_shapes)
    own = [OwnModel(path, arguments.calibration, shapes) for path in models]
    for model in own:
        if model.name in NETWORKS or [m.name for m in own].count(model.name) > 1:
            raise SystemExit(f"{model.path}: another network is called {model.name}, too: rename the file")
    folder: Path = arguments.folder
    return [NetworkFiles(n, folder) for n in names] + [NetworkFiles(m.name, folder, m) for m in own]


def prepare(network: NetworkFiles, instruction_set: str, precisions: Sequence[str], engines_python: str) -> None:
    """Makes the models of all engines; our own are compiled anew each time."""
    network.make_float_model()
    network.make_other_models(engines_python)
    network.make_artifacts(instruction_set, TARGETS[instruction_set], tuple(precisions))


def contestants_for(
    network: NetworkFiles, instruction_set: str, precisions: Sequence[str], engines_python: str
) -> list[Contestant]:
    """All engines that have a model of one network, ours last."""
    environment = other_environment(instruction_set, engines_python, network.folder)
    models = (
        ("onnxruntime", network.float_model),
        ("onnxruntime", network.onnxruntime_u8s8),
        ("onnxruntime", network.onnxruntime_s8s8),
        ("openvino", network.float_model),
        ("openvino", network.openvino_int8),
    )
    others = [
        Contestant(name, engines_python, engine, model, environment)
        for name, (engine, model) in zip(OTHERS, models, strict=True)
        if model.exists()
    ]
    ours = [
        Contestant(
            f"ours {p}", sys.executable, "tvm_hquant", network.artifact(instruction_set, p), process_environment()
        )
        for p in precisions
    ]
    return others + ours


def other_environment(instruction_set: str, engines_python: str, folder: Path) -> dict[str, str]:
    """Environment variables of the other engines, which keep them from instructions that do not count."""
    if instruction_set != "avx2" or "avx512f" not in cpu_features():
        return process_environment()
    masked = folder / "without_avx512"
    masked.mkdir(parents=True, exist_ok=True)
    for package in ("onnxruntime", "openvino"):
        find = f"import importlib.util as u; print(u.find_spec({package!r}).submodule_search_locations[0])"
        found = subprocess.run([engines_python, "-c", find], capture_output=True, text=True, check=True).stdout
        without_avx512(Path(found.strip()), masked)
    return process_environment(PYTHONPATH=str(masked), ONEDNN_MAX_CPU_ISA="AVX2")


def time_contestants(
    network: NetworkFiles,
    contestants: Sequence[Contestant],
    threads: int,
    visits: int,
    runs: int,
    between_turns: Callable[[], None] = lambda: None,
) -> list[Timing]:
    """Lets all engines run by turns, ``visits`` times each; ``between_turns`` is called after each turn."""
    turns: list[list[tuple[float, ...]]] = []
    with ExitStack() as stack:
        processes = [stack.enter_context(_EngineProcess(c, network.inputs, threads)) for c in contestants]
        for _ in range(visits):
            turns.append([])
            for process in processes:
                turns[-1].append(process.time(runs))
                between_turns()
    return [
        Timing(network.name, contestant.name, tuple(visit))
        for contestant, visit in zip(contestants, zip(*turns, strict=True), strict=True)
    ]


def _keep_probes(probe: Callable[[], list[float]], probes: list[float]) -> None:
    probes += probe()


class _EngineProcess:
    """An engine that waits for its turn."""

    def __init__(self, contestant: Contestant, inputs: Path, threads: int) -> None:
        self.name = contestant.name
        command = [contestant.python, str(PROCESS), "time", contestant.engine, str(contestant.model), str(inputs)]
        self.process = subprocess.Popen(
            [*command, str(threads)],
            env=contestant.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> _EngineProcess:
        if self._answer() != "ready":
            raise SystemExit(f"{self.name} did not start; its messages stand above")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def time(self, runs: int) -> tuple[float, ...]:
        """Seconds of ``runs`` runs."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{runs}\n")
        self.process.stdin.flush()
        return tuple(json.loads(self._answer() or "[]"))

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def print_timings(timings: Sequence[Timing], probes: Mapping[str, Sequence[float]]) -> None:
    """A row for each network: all engines in milliseconds, then our ratios, and how much of the time the core was shared.

    Empty: an engine has no model of it.
    """
    by_network: dict[str, dict[str, Timing]] = {}
    for timing in timings:
        by_network.setdefault(timing.network, {})[timing.contestant] = timing
    ours = list(dict.fromkeys(t.contestant for t in timings if t.contestant not in OTHERS))
    names = [name for name in OTHERS if any(name in row for row in by_network.values())] + ours
    rows = []
    for network, row in by_network.items():
        fastest, fastest_float = fastest_others(row)
        cells = [f"{row[name].milliseconds:.2f}" if name in row else "" for name in names]
        ratios = [f"{ratio(row, name):.2f}" for name in ours]
        shared = f"{shared_part(probes[network]):.0%}"
        rows.append((network_title(network), *cells, fastest, fastest_float, *ratios, shared))
    ratios_of = (f"ratio {name.split()[1]}" for name in ours)
    columns = ("ms", *names, "fastest other", "fastest other float32", *ratios_of, "core shared")
    print_table(columns, rows)


def draw_roofline(
    networks: Sequence[NetworkFiles], instruction_set: str, precision: str, threads: int, picture: Path
) -> None:
    """Profiles our artifacts of a precision, each in a process of its own, and draws all their kernels in one picture."""
    profiles: dict[str, dict[str, Any]] = {}
    for network in networks:
        artifact = network.artifact(instruction_set, precision)
        profile = artifact.with_suffix(".profile.json")
        subprocess.run(
            [sys.executable, "-m", "tvm_hquant.cli.main", "profile", str(artifact), "--json", str(profile)],
            env=process_environment(TVM_NUM_THREADS=str(threads)),
            stdout=subprocess.DEVNULL,
            check=True,
        )
        profiles[f"{network_title(network.name)}, {precision}"] = json.loads(profile.read_text("utf-8"))
    draw(profiles, picture)


def fastest_others(row: dict[str, Timing]) -> tuple[str, str]:
    """The fastest other engine, and the fastest other in float32."""
    others = [row[name] for name in OTHERS if name in row]
    floats = [t for t in others if t.contestant.endswith("float32")]
    return tuple(min(group, key=lambda t: t.milliseconds).contestant for group in (others, floats))  # type: ignore[return-value]


def ratio(row: dict[str, Timing], name: str) -> float:
    """Our time over the fastest other engine's; a float precision is compared with the others' float32."""
    fastest, fastest_float = fastest_others(row)
    other = fastest_float if "float" in name else fastest
    return row[name].milliseconds / row[other].milliseconds


def _document(
    arguments: argparse.Namespace, timings: Sequence[Timing], probes: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    return {
        "machine": describe_machine(),
        "engines": json.loads(run_process(arguments.engines_python, "versions")),
        "instruction_set": arguments.instruction_set,
        "threads": arguments.threads,
        "load": os.getloadavg(),
        "core_shared": {network: shared_part(seconds) for network, seconds in probes.items()},
        "timings": [{**asdict(t), "milliseconds": t.milliseconds} for t in timings],
    }


def _best_instruction_set() -> str:
    return "avx512-vnni" if "avx512_vnni" in cpu_features() else "avx2"


if __name__ == "__main__":
    main()
