"""The experiment of "Quantization in Layer's Input is Matter" (section 6): the loss under noise that layouts assign to layers.

    python -m benchmarks.paper_layout [--seeds 5] [--samples 256] [--networks …]

Four levels of uniform noise, ±10⁻³, ±10⁻⁵, ±10⁻⁷ and ±10⁻¹⁰, are added to what layers read and to their weights; a quarter
of the layers gets each. HAWQ-v2 ranks the layers by average Hessian traces, Algorithm 1 by gradient norms at the inputs,
Algorithm 3 by those plus the norms of the weights' gradients, with all weights moved by the largest noise first, as if stored;
weights that get that level are not moved again. Noise of 10⁻¹⁰ vanishes in float32, so the network is run in float64. A second
line has noise relative to the root mean square of each tensor, a third real precisions instead of noise. The paper's own
figures stand beside; its networks and samples are others.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.float64_network import Float64Network, cross_entropy
from benchmarks.zoo import ZooModel
from tvm_hquant import api
from tvm_hquant.calibration.samples import Sample
from tvm_hquant.precision import parse_precision
from tvm_hquant.search.layout import AfterStorageStrategy, GradientStrategy, HessianStrategy, LayoutData
from tvm_hquant.session import QuantizationSession

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
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Experiment:
    """One network in float64 with its samples, and the level of every layer by method (0: the largest noise)."""

    network: Float64Network
    samples: Sequence[Sample]
    levels: Mapping[str, Mapping[str, int]]

    def loss(self, method: str | None, seed: int, relative: bool) -> float:
        """Mean cross entropy under the noise of a method; None: without noise."""
        random = np.random.default_rng(seed)
        weights: dict[str, Floats] = {}
        if method is not None:
            for name, own in self.network.weights.items():
                unit = float(np.sqrt(np.mean(own**2))) if relative else 1.0
                level = self.levels[method][name]
                moved = own + (_noise(random, own.shape, 0, unit) if method == "Algorithm 3" else 0.0)
                # What is stored at the largest noise is not rounded anew at that level.
                kept = method == "Algorithm 3" and level == 0
                weights[name] = moved if kept else moved + _noise(random, own.shape, level, unit)
        losses = []
        for start in range(0, len(self.samples), _BATCH):
            batch = self.samples[start : start + _BATCH]
            inputs = {"input": np.concatenate([s.inputs["input"] for s in batch]).astype(np.float64)}
            added = None
            if method is not None:
                added = self._added(inputs, method, random, relative)
            logits = self.network.logits(inputs, added=added, weights=weights)
            losses.append(cross_entropy(logits, [s.label or 0 for s in batch]))
        return float(np.mean(np.concatenate(losses)))

    def _added(
        self, inputs: Mapping[str, Any], method: str, random: np.random.Generator, relative: bool
    ) -> dict[str, Floats]:
        tensors = self.network.run(inputs) if relative else {}
        count = len(inputs["input"])
        added = {}
        for layer in self.network.graph.anchors:
            tensor = layer.inputs[0]
            unit = float(np.sqrt(np.mean(tensors[tensor] ** 2))) if relative else 1.0
            shape = (count, *self.network.graph.tensor_shape(tensor)[1:])
            added[layer.name] = _noise(random, shape, self.levels[method][layer.name], unit)
        return added


def _noise(random: np.random.Generator, shape: tuple[int, ...], level: int, unit: float) -> Floats:
    return random.uniform(-LEVELS[level] * unit, LEVELS[level] * unit, shape)


def quarters(scores: Mapping[str, float]) -> dict[str, int]:
    """The level of each layer: the quarter of the layers with the smallest scores gets level 0, and so on."""
    ordered = sorted(scores, key=lambda name: scores[name])
    return {name: 4 * rank // len(ordered) for rank, name in enumerate(ordered)}


def method_scores(session: QuantizationSession, samples: Any) -> dict[str, dict[str, float]]:
    """What each method ranks layers by."""
    data = LayoutData(session, samples)
    inputs, weights = AfterStorageStrategy(data).norms()
    return {
        "HAWQ-v2": HessianStrategy(data, draws=2).traces(),
        "Algorithm 1": GradientStrategy(data).norms(),
        "Algorithm 3": {name: inputs[name] + weights[name] for name in inputs},
    }


def real_losses(
    session: QuantizationSession, samples: Sequence[Sample], levels: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """Mean cross entropy with a real precision for each level, computed by the kernels of deployment."""
    programs = [session.float_program]
    programs += [session.program({n: parse_precision(PRECISIONS[v]) for n, v in levels[m].items()}) for m in METHODS]
    session.engine.compile(programs)
    sums = np.zeros(len(programs))
    for sample in samples:
        outputs = session.engine.run(sample.inputs, programs)
        for number, (logits, *_) in enumerate(outputs):
            sums[number] += cross_entropy(logits.reshape(1, -1).astype(np.float64), [sample.label or 0])[0]
    return dict(zip(("float", *METHODS), (sums / len(samples)).tolist(), strict=True))


def main() -> None:
    """Prints a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--networks", nargs="*", default=list(PAPER))
    arguments = parser.parse_args()
    os.environ.setdefault("TVM_NUM_THREADS", "1")
    for name in arguments.networks:
        model = ZooModel(name)
        source = model.source("eval")
        chosen = np.random.default_rng(0).choice(source.count, arguments.samples, replace=False)
        subset = source.subset(sorted(chosen.tolist()))
        samples = list(subset)
        session = api.open_session(str(model.path), "host")
        session.calibrate(model.source("calib"), 64)
        levels = {method: quarters(scores) for method, scores in method_scores(session, subset).items()}
        experiment = Experiment(Float64Network(session.graph), samples, levels)
        clean = experiment.loss(None, 0, False)
        print(f"\n{name}, {len(samples)} samples, {arguments.seeds} seeds: mean loss (standard deviation over seeds)\n")
        print("| | float | " + " | ".join(METHODS) + " |\n|---|---|---|---|---|")
        for title, relative in (("noise", False), ("noise relative to the tensor", True)):
            cells = []
            for method in METHODS:
                losses = [experiment.loss(method, seed, relative) - clean for seed in range(arguments.seeds)]
                cells.append(f"{np.mean(losses):+.2e} ({np.std(losses):.1e})")
            print(f"| {title}, loss added | {clean:.4f} | " + " | ".join(cells) + " |", flush=True)
        real = real_losses(session, samples, levels)
        cells = [f"{real[m] - real['float']:+.2e}" for m in METHODS]
        print(f"| {', '.join(PRECISIONS)}, loss added | {real['float']:.4f} | " + " | ".join(cells) + " |")
        if name in PAPER:
            print("| paper, loss | " + " | ".join(f"{v:.4f}" for v in PAPER[name]) + " |")
        for method in METHODS:
            listed = " ".join(f"{n}:{v}" for n, v in levels[method].items())
            print(f"\n{method}: {listed}", flush=True)


if __name__ == "__main__":
    main()
