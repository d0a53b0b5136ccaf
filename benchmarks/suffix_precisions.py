"""Which precision may layers behind a measured one have? How well sensitivities predict what whole plans lose, by suffix.

    python -m benchmarks.suffix_precisions [--models kws,resnet8] [--samples 300] [--plans 150]
        [--precisions a8w3,a8w4,a8w6,a8w8,bfloat16,float32] [--suffixes float32,bfloat16,a16w8,a8w8]

Plans are drawn at random, each from shares of the precisions that are drawn themselves: their losses lie decades apart. The
sum of the sensitivities of a plan's layers (:mod:`tvm_hquant.sensitivity.single_layers`) is compared with its joint loss, both
divergences from the float model. One factor common to all plans is taken out; "half within" and "9 of 10 within" are the
relative errors that half of the plans and nine tenths have at most. With "same" samples both were measured on all samples, with
"others" sensitivities on one half and joint losses on the other. "Correlation" is that of the logarithms of a precision's
sensitivities, over layers, with those of the float32 suffix; "zero" counts sensitivities that had to be raised to 0.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from benchmarks.zoo import ZooModel, zoo_models
from tvm_hquant import api
from tvm_hquant.cli.tables import print_table
from tvm_hquant.precision import FLOAT32, parse_precision
from tvm_hquant.search.problem import Assignment, LayerPrecision
from tvm_hquant.sensitivity.single_layers import SingleLayerPlans
from tvm_hquant.simulator.metrics import METRICS

Floats = npt.NDArray[np.float64]


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="kws,resnet8", help="parts of names, with commas between")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--plans", type=int, default=150)
    parser.add_argument("--precisions", default="a8w3,a8w4,a8w6,a8w8,bfloat16,float32")
    parser.add_argument("--suffixes", default="float32,bfloat16,a16w8,a8w8")
    arguments = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    for name in zoo_models():
        if any(part in name for part in arguments.models.split(",")):
            rows += compare(ZooModel(name), arguments)
    columns = ("network", "suffix", "samples", "half within", "9 of 10 within", "correlation", "zero")
    print_table(columns, rows)


def compare(model: ZooModel, arguments: argparse.Namespace) -> list[tuple[str, ...]]:
    """Rows of one network, two for each suffix."""
    session = api.open_session(str(model.path), "host")
    session.calibrate(model.calibration())
    evaluation = model.evaluation()
    samples = evaluation.subset(
        sorted(np.random.default_rng(0).permutation(evaluation.count)[: arguments.samples].tolist())
    )

    def divergences(plans: Sequence[Assignment]) -> Floats:
        programs = [session.program({n: parse_precision(p) for n, p in plan.items()}) for plan in plans]
        scores = session.evaluate(programs, samples, METRICS["kl"], model.title)
        return np.array([[score.value for score in own.scores] for own in scores])

    layers = [layer.name for layer in session.graph.anchors]
    names = arguments.precisions.split(",")
    plans = random_plans(layers, names, arguments.plans)
    joint = divergences(plans)
    pairs = [(layer, p) for layer in layers for p in names]
    everything, first = np.ones(joint.shape[1], bool), np.arange(joint.shape[1]) % 2 == 0
    exact: dict[str, Mapping[LayerPrecision, float]] = {}
    rows: list[tuple[str, ...]] = []
    for suffix in arguments.suffixes.split(","):
        own = SingleLayerPlans(layers, dict.fromkeys(layers, suffix))
        measured = divergences(own.plans(pairs))
        for label, ours, theirs in (("same", everything, everything), ("others", first, ~first)):
            losses = measured[:, ours].mean(axis=1).tolist()
            found = own.losses(pairs, partial(_given, losses))
            exact.setdefault(label, found)
            half, nine = errors(found, plans, joint[:, theirs].mean(axis=1))
            zero = sum(1 for (_, p), loss in found.items() if p != FLOAT32.name and loss == 0)
            correlations = " ".join(
                f"{p} {correlation(found, exact[label], p):.2f}" for p in names if p != FLOAT32.name
            )
            rows.append((model.title, suffix, label, f"{half:.0%}", f"{nine:.0%}", correlations, str(zero)))
    return rows


def _given(losses: list[float], _plans: Sequence[Assignment]) -> list[float]:
    return losses


def random_plans(layers: Sequence[str], precisions: Sequence[str], count: int) -> list[dict[str, str]]:
    """Plans whose shares of precisions follow a Dirichlet distribution in which few prevail."""
    random = np.random.default_rng(1)
    return [
        dict(
            zip(
                layers,
                random.choice(precisions, len(layers), p=random.dirichlet(np.full(len(precisions), 0.4))).tolist(),
                strict=True,
            )
        )
        for _ in range(count)
    ]


def errors(losses: Mapping[LayerPrecision, float], plans: Sequence[Assignment], joint: Floats) -> tuple[float, float]:
    """The relative errors of sums that half of the plans and nine tenths have at most; plans that lose nothing are left out."""
    sums = np.array([sum(losses[pair] for pair in plan.items()) for plan in plans])
    counts = (sums > 0) & (joint > 0)
    ratios = np.log(sums[counts] / joint[counts])
    off = np.abs(ratios - np.median(ratios))
    return float(np.expm1(np.median(off))), float(np.expm1(np.quantile(off, 0.9)))


def correlation(losses: Mapping[LayerPrecision, float], exact: Mapping[LayerPrecision, float], precision: str) -> float:
    """Of the logarithms of what layers lose in one precision, by two suffixes, where both are above 0."""
    both = [(losses[pair], exact[pair]) for pair in losses if pair[1] == precision and losses[pair] > 0 < exact[pair]]
    return float(np.corrcoef(np.log(np.array(both)).T)[0, 1])


if __name__ == "__main__":
    main()
