"""The experiment of "Quantization in Layer's Input is Matter" (section 6): the loss under noise that layouts assign to layers.

    python -m benchmarks.paper_layout [--seeds 10] [--samples 256] [--networks …] [--json FILE]

Four levels of uniform noise, ±10⁻³, ±10⁻⁵, ±10⁻⁷ and ±10⁻¹⁰, are added to what layers read and to their weights; a quarter
of the layers gets each. HAWQ-v2 ranks the layers by average Hessian traces, Algorithm 1 by gradient norms at the inputs,
Algorithm 3 by those plus the norms of the weights' gradients, with all weights moved by the largest noise first, as if stored;
weights that get that level are not moved again. Noise of 10⁻¹⁰ vanishes in float32, so the network is run in float64.

Rows: the paper's noise; the same where the network reads pixels of 0 … 1 (the zoo's read 0 … 255: the first layer's weights
times 255 are the same function, but another share of its weights is noise); noise relative to the root mean square of each
tensor; real precisions in place of noise. Intervals are 95 % bootstrap intervals over samples and seeds together, paired with
the float model and, in the last column, between two methods. The paper's figures stand beside; its networks and samples are
others.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.float64_network import Float64Network, cross_entropy
from benchmarks.machine import describe_machine
from benchmarks.zoo import ZooModel
from tvm_hquant import api
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.precision import parse_precision
from tvm_hquant.search.layout import AfterStorageStrategy, GradientStrategy, HessianStrategy, LayoutData
from tvm_hquant.session import QuantizationSession
from tvm_hquant.statistics import Interval

Floats = npt.NDArray[np.float64]

LEVELS = (1e-3, 1e-5, 1e-7, 1e-10)
"""Half-widths of the uniform noise; the least sensitive quarter of the layers gets the first."""
PRECISIONS = ("a8w4", "a8w8", "bfloat16", "float32")
"""In place of the levels."""
PAPER = {
    "cifar10_resnet8_mlperftiny.onnx": (0.3896, 0.4268, 0.3971, 0.3980),
    "cifar10_resnet14_mlperftiny.onnx": (0.3161, 0.3284, 0.3179, 0.3210),
}
"""The paper's losses of ResNet-8 and ResNet-14: float, HAWQ-v2, Algorithm 1, Algorithm 3."""
METHODS = ("HAWQ-v2", "Algorithm 1", "Algorithm 3")
PIXELS = 255.0
_BATCH = 32


@dataclass(frozen=True)
class Derivatives:
    """What layers are ranked by, for each: average Hessian trace, gradient norm at its input, and both norms after storage."""

    traces: dict[str, float]
    inputs: dict[str, float]
    stored_inputs: dict[str, float]
    stored_weights: dict[str, float]

    def levels(self) -> dict[str, dict[str, int]]:
        """By method the level of every layer (0: the largest noise)."""
        sums = {name: norm + self.stored_weights[name] for name, norm in self.stored_inputs.items()}
        scores = zip(METHODS, (self.traces, self.inputs, sums), strict=True)
        return {method: quarters(own) for method, own in scores}

    def with_input_scaled(self, layer: str, scale: float) -> Derivatives:
        """Those of the same function whose first layer reads 1/scale of its input and has scale times its weights."""
        return Derivatives(
            {**self.traces, layer: self.traces[layer] / scale**2},
            {**self.inputs, layer: self.inputs[layer] * scale},
            {**self.stored_inputs, layer: self.stored_inputs[layer] * scale},
            {**self.stored_weights, layer: self.stored_weights[layer] / scale},
        )


@dataclass(frozen=True, eq=False)
class Experiment:
    """One network in float64 with its samples, and the level of every layer by method.

    Attributes:
        inputs, labels: of all samples; what the network reads, and class indices.
        units: factors of the noise on tensors by name; 1 for those that are not listed.
        weight_units: the same for weights, by layer.
    """

    network: Float64Network
    weights: Mapping[str, Floats]
    inputs: Floats
    labels: npt.NDArray[np.int64]
    levels: Mapping[str, Mapping[str, int]]
    units: Mapping[str, float]
    weight_units: Mapping[str, float]

    def losses(self, method: str | None, seed: int) -> Floats:
        """Cross entropy of every sample under the noise of a method; None: without noise."""
        random = np.random.default_rng(seed)
        weights = self.weights if method is None else self._moved_weights(method, random)
        found = []
        for start in range(0, len(self.inputs), _BATCH):
            inputs = self.inputs[start : start + _BATCH]
            added = None if method is None else self._added(len(inputs), method, random)
            logits = self.network.logits({"input": inputs}, added=added, weights=weights)
            found.append(cross_entropy(logits, self.labels[start : start + _BATCH]))
        return np.concatenate(found)

    def relative(self) -> Experiment:
        """The experiment with noise relative to the root mean square of each tensor."""
        squares: dict[str, list[float]] = {}
        for start in range(0, len(self.inputs), _BATCH):
            for name, values in self.network.run({"input": self.inputs[start : start + _BATCH]}).items():
                squares.setdefault(name, []).append(float(np.sum(values**2)) / len(values))
        batches = -(-len(self.inputs) // _BATCH)
        sizes = {name: np.prod(self.network.graph.tensor_shape(name)[1:]) for name in squares}
        units = {name: float(np.sqrt(sum(sums) / batches / sizes[name])) for name, sums in squares.items()}
        weight_units = {name: float(np.sqrt(np.mean(values**2))) for name, values in self.weights.items()}
        return replace(self, units=units, weight_units=weight_units)

    def _moved_weights(self, method: str, random: np.random.Generator) -> dict[str, Floats]:
        moved = {}
        for name, own in self.weights.items():
            level, unit = self.levels[method][name], self.weight_units.get(name, 1.0)
            stored = own + _noise(random, own.shape, 0, unit) if method == "Algorithm 3" else own
            # What is stored at the largest noise is not rounded anew at that level.
            kept = method == "Algorithm 3" and level == 0
            moved[name] = stored if kept else stored + _noise(random, own.shape, level, unit)
        return moved

    def _added(self, count: int, method: str, random: np.random.Generator) -> dict[str, Floats]:
        added = {}
        for layer in self.network.graph.anchors:
            tensor = layer.inputs[0]
            shape = (count, *self.network.graph.tensor_shape(tensor)[1:])
            added[layer.name] = _noise(random, shape, self.levels[method][layer.name], self.units.get(tensor, 1.0))
        return added


@dataclass(frozen=True)
class Row:
    """One kind of noise: the loss without it, what each method adds, and how much less Algorithm 1 adds than HAWQ-v2."""

    network: str
    title: str
    clean: float
    added: dict[str, Interval]
    advantage: Interval
    levels: Mapping[str, Mapping[str, int]]


def _noise(random: np.random.Generator, shape: tuple[int, ...], level: int, unit: float) -> Floats:
    return random.uniform(-LEVELS[level] * unit, LEVELS[level] * unit, shape)


def quarters(scores: Mapping[str, float]) -> dict[str, int]:
    """The level of each layer: the quarter of the layers with the smallest scores gets level 0, and so on."""
    ordered = sorted(scores, key=lambda name: scores[name])
    return {name: 4 * rank // len(ordered) for rank, name in enumerate(ordered)}


def crossed_interval(values: Floats, resamples: int = 2000) -> Interval:
    """The mean of [seeds, samples] with its 95 % interval: seeds and samples are both drawn anew (percentile bootstrap)."""
    random = np.random.default_rng(0)
    seeds, samples = values.shape
    means = []
    for _ in range(resamples):
        by_seed = np.bincount(random.integers(0, seeds, seeds), minlength=seeds) / seeds
        by_sample = np.bincount(random.integers(0, samples, samples), minlength=samples) / samples
        means.append(by_seed @ values @ by_sample)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def measure(model: ZooModel, sample_count: int, seeds: int) -> list[Row]:
    """All rows of one network; each is printed as soon as it is there."""
    source = model.source("eval")
    chosen = np.random.default_rng(0).choice(source.count, sample_count, replace=False)
    subset = source.subset(sorted(chosen.tolist()))
    samples = list(subset)
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.source("calib"), 64)
    data = LayoutData(session, subset)
    derivatives = Derivatives(
        HessianStrategy(data, draws=2).traces(), GradientStrategy(data).norms(), *AfterStorageStrategy(data).norms()
    )
    network = Float64Network(session.graph)
    inputs = np.concatenate([s.inputs["input"] for s in samples]).astype(np.float64)
    labels = np.array([s.label or 0 for s in samples])
    as_is = Experiment(network, network.weights, inputs, labels, derivatives.levels(), {}, {})
    first = session.graph.anchors[0].name
    weights = {**network.weights, first: network.weights[first] * PIXELS}
    scaled = replace(
        as_is,
        weights=weights,
        inputs=inputs / PIXELS,
        levels=derivatives.with_input_scaled(first, PIXELS).levels(),
    )
    experiments = {
        "the paper's noise": as_is,
        "the paper's noise, pixels of 0 … 1": scaled,
        "noise relative to each tensor": as_is.relative(),
    }
    rows = []
    for title, experiment in experiments.items():
        clean = experiment.losses(None, 0)
        losses = {m: np.array([experiment.losses(m, seed) for seed in range(seeds)]) for m in METHODS}
        rows.append(_row(model.title, title, clean, losses, experiment.levels))
        _print_row(rows[-1])
    clean, losses = real_losses(session, samples, as_is.levels)
    rows.append(_row(model.title, ", ".join(PRECISIONS) + " for the levels", clean, losses, as_is.levels))
    _print_row(rows[-1])
    return rows


def real_losses(
    session: QuantizationSession, samples: Sequence[Sample], levels: Mapping[str, Mapping[str, int]]
) -> tuple[Floats, dict[str, Floats]]:
    """Cross entropy of every sample, float and with a real precision for each level, by the kernels of deployment."""
    programs = [session.float_program]
    programs += [session.program({n: parse_precision(PRECISIONS[v]) for n, v in levels[m].items()}) for m in METHODS]
    session.engine.compile(programs)
    found = []
    for sample in samples:
        outputs = session.engine.run(sample.inputs, programs)
        logits = np.concatenate([own[0].reshape(1, -1) for own in outputs]).astype(np.float64)
        found.append(cross_entropy(logits, [sample.label or 0] * len(programs)))
    clean, *others = np.array(found).T
    return clean, {method: own[None] for method, own in zip(METHODS, others, strict=True)}


def _row(
    network: str, title: str, clean: Floats, losses: Mapping[str, Floats], levels: Mapping[str, Mapping[str, int]]
) -> Row:
    added = {method: crossed_interval(own - clean) for method, own in losses.items()}
    return Row(
        network, title, float(clean.mean()), added, crossed_interval(losses[METHODS[0]] - losses[METHODS[1]]), levels
    )


def _print_row(row: Row) -> None:
    cells = [f"{i.estimate:+.2e} ({i.low:+.1e} … {i.high:+.1e})" for i in (*row.added.values(), row.advantage)]
    verdict = "better" if row.advantage.low > 0 else "worse" if row.advantage.high < 0 else "within the noise"
    print(f"| {row.title} | {row.clean:.4f} | " + " | ".join(cells) + f", {verdict} |", flush=True)


def main() -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--networks", nargs="*", default=list(PAPER))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    rows: list[dict[str, Any]] = []
    for name in arguments.networks:
        print(f"\n{name}, {arguments.samples} samples, {arguments.seeds} seeds: loss added (95 %)\n")
        print(
            "| | float | " + " | ".join(METHODS) + " | HAWQ-v2 − Algorithm 1 |\n|---|---|---|---|---|---|", flush=True
        )
        found = measure(ZooModel(name), arguments.samples, arguments.seeds)
        if name in PAPER:
            clean, *others = PAPER[name]
            published = [f"{loss - clean:+.4f}" for loss in others]
            print(f"| the paper's | {clean:.4f} | " + " | ".join(published) + f" | {others[0] - others[1]:+.4f} |")
        for method, levels in found[0].levels.items():
            print(f"\n{method}: " + " ".join(f"{layer}:{level}" for layer, level in levels.items()), flush=True)
        rows += [asdict(row) for row in found]
        if arguments.json:
            arguments.json.write_text(json.dumps({"machine": describe_machine(), "rows": rows}))


if __name__ == "__main__":
    main()
