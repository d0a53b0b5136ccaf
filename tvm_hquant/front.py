"""The Pareto front of a search, on disk: plans, what they lose and cost, a plot, and the best plan for the budget.

While the search runs, the folder always holds the best plans so far, with what is known of them; figures on samples that the
search does not see, and measured times, come at its end.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from tvm_hquant.atomic_file import write_at_once
from tvm_hquant.cost.plan_costs import plan_costs
from tvm_hquant.cost.predicted import weight_bytes
from tvm_hquant.front_plot import draw_front
from tvm_hquant.json_text import json_text
from tvm_hquant.plan import LayerDecision, PrecisionPlan
from tvm_hquant.planning import make_plan, stored_bits_of, with_stored_bits
from tvm_hquant.precision import parse_precision
from tvm_hquant.quantizer import Quantizer, low_bit_share
from tvm_hquant.search.archive import EvaluatedPlan
from tvm_hquant.search.joint_losses import PlanScores, score_programs
from tvm_hquant.search.problem import SearchResult
from tvm_hquant.simulator.program import Program


@dataclass(frozen=True)
class FrontPoint:
    """One plan of the front, as ``front.json`` lists it, with null for an infinite loss: an output was not finite.

    Attributes:
        plan: name of the plan's file in the folder.
        cost: what the search minimized: microseconds of one core, bytes, or multiply-accumulates in units of 8 × 8 bits
            (:mod:`tvm_hquant.cost.plan_costs`).
        expected_loss: what the search went by, in the metric's unit: for top-1 the drop to expect
            (:mod:`tvm_hquant.search.expected_drop`), otherwise ``loss``. Along a front it falls as ``cost`` rises.
        loss, loss_interval: on the search samples, in the metric's unit, with the 95 % interval.
        holdout_loss, holdout_interval: on samples that the search did not see; None while it runs.
        holdout_expected_loss: as ``expected_loss``, on those samples.
        divergence, holdout_divergence: mean divergence from the float model's output, nats; for the metrics ``mse`` and
            ``sqnr`` the mean squared error. It tells plans apart whose ``loss`` is equal.
        latency_ms, latency_source: of one call; ``measured`` here, or ``predicted`` by the target spec for one core.
        bytes: of all weights with scales and biases.
        int8_mac_share: share of multiply-accumulates in 8 bits or fewer.
        evaluations: plans that the search had asked for, single layers and joint ones, whoever made them.
    """

    plan: str
    cost: float
    expected_loss: float
    loss: float
    loss_interval: tuple[float, float]
    holdout_loss: float | None
    holdout_interval: tuple[float, float] | None
    holdout_expected_loss: float | None
    divergence: float
    holdout_divergence: float | None
    latency_ms: float
    latency_source: str
    bytes: int
    int8_mac_share: float
    evaluations: int


@dataclass(frozen=True)
class Front:
    """A whole front: its points, the cheapest first, which of them is the best for the budget, and what the budget was.

    ``remark`` says what a user has to know of the answer, such as that there are too few samples for it.
    """

    points: tuple[FrontPoint, ...]
    best: FrontPoint
    within_budget: bool
    max_drop: float
    metric: str
    objective: str
    strategy: str
    remark: str = ""


class FrontWriter:
    """Writes the front of one search into a folder.

    Args:
        quantizer: that searches; its archive is watched.
        folder: is made if there is none; plans of an earlier search in it are removed.
        strategy: its name.
        measure: whether this machine is the target, so that times are measured.
    """

    def __init__(self, quantizer: Quantizer, folder: Path, strategy: str, measure: bool) -> None:
        self._quantizer, self._folder, self._strategy, self._measure = quantizer, folder, strategy, measure
        folder.mkdir(parents=True, exist_ok=True)
        layers = quantizer.session.graph.anchors
        candidates = {layer.name: quantizer.rules.of(layer) for layer in layers}
        self._latency = plan_costs(quantizer.session, candidates, "latency", quantizer.layer_times)

    def write_partial(self, front: Sequence[EvaluatedPlan]) -> None:
        """The best plans so far. Their weights are made again when they are compiled."""
        points = []
        for name in ("best.json", "best.npz", "front.png"):  # of an earlier search: not of these plans
            (self._folder / name).unlink(missing_ok=True)
        for number, found in enumerate(front):
            name, weights = f"plan_{number:02}.json", f"plan_{number:02}.npz"
            (self._folder / weights).unlink(missing_ok=True)
            write_at_once(self._folder / name, self._plan(found).to_json(None, weights))
            points.append(self._point(name, found, None, self._latency.total(found.assignment) / 1e3, "predicted"))
        self._remove_from(len(front))
        write_at_once(self._folder / "front.json", _text(points))

    def write(self, result: SearchResult) -> Front:
        """The final front, measured on the held-out samples, with the plan that the search chose as ``best.json``."""
        quantizer, session = self._quantizer, self._quantizer.session
        chosen = {layer: decision.precision for layer, decision in result.decisions.items()}
        front = list(quantizer.archive.front)
        best = quantizer.archive.find(chosen, stored_bits_of(result.decisions))
        assert best is not None, "a search evaluates the plan that it chooses"
        if best not in front:
            front = sorted([*front, best], key=lambda found: (found.cost, found.expected))
        programs = [self._program(found) for found in front]
        scores = score_programs(session, programs, quantizer.roles.held_out, quantizer.metric, "measuring the front")
        points = []
        for number, (found, score) in enumerate(zip(front, scores, strict=True)):
            name = f"plan_{number:02}.json"
            decisions = result.decisions if found is best else None
            plan = self._plan(found, decisions)
            plan.save_as(self._folder / name)
            if found is best:
                plan.save_as(self._folder / "best.json")
            latency = self._measured(found) if self._measure else self._latency.total(found.assignment) / 1e3
            source = "measured" if self._measure else "predicted"
            points.append(self._point(name, found, score, latency, source))
        self._remove_from(len(front))
        write_at_once(self._folder / "front.json", _text(points))
        options = quantizer.options
        made = Front(
            tuple(points),
            points[front.index(best)],
            result.within_budget,
            options.max_drop,
            quantizer.metric.name,
            options.objective,
            self._strategy,
            result.remark,
        )
        draw_front(made, self._folder / "front.png")
        return made

    def _point(
        self, name: str, found: EvaluatedPlan, held_out: PlanScores | None, latency: float, source: str
    ) -> FrontPoint:
        session = self._quantizer.session
        layers = session.graph.anchors
        precisions = session.all_precisions(
            {layer.name: parse_precision(found.assignment[layer.name]).computed for layer in layers}
        )
        decisions = with_stored_bits(found.assignment, found.stored_bits)
        return FrontPoint(
            name,
            found.cost,
            found.expected,
            found.loss.estimate,
            (found.loss.low, found.loss.high),
            None if held_out is None else held_out.interval.estimate,
            None if held_out is None else (held_out.interval.low, held_out.interval.high),
            None if held_out is None else held_out.loss(),
            found.divergence,
            None if held_out is None else held_out.divergence,
            latency,
            source,
            math.ceil(sum(weight_bytes(layer, decisions[layer.name].weight_precision) for layer in layers)),
            low_bit_share(session.graph.layers, precisions),
            self._quantizer.evaluations,
        )

    def _plan(self, found: EvaluatedPlan, decisions: Mapping[str, LayerDecision] | None = None) -> PrecisionPlan:
        reason = f"on the Pareto front of {self._strategy}"
        made = decisions or with_stored_bits(found.assignment, found.stored_bits, detail=reason)
        return make_plan(self._quantizer.session, made)

    def _program(self, found: EvaluatedPlan) -> Program:
        precisions = {name: parse_precision(p) for name, p in found.assignment.items()}
        return self._quantizer.session.program(precisions, found.stored_bits)

    def _measured(self, found: EvaluatedPlan, repeat: int = 15) -> float:
        """Median milliseconds of one sample through the kernels of a plan."""
        session = self._quantizer.session
        sample = next(islice(iter(self._quantizer.roles.held_out), 1))
        program = self._program(found)
        engine = session.target_engine
        engine.compile([program])
        engine.run(sample.inputs, [program])
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            engine.run(sample.inputs, [program])
            times.append(time.perf_counter() - start)
        return 1e3 * statistics.median(times)

    def _remove_from(self, number: int) -> None:
        for path in self._folder.glob("plan_*.*"):
            digits = path.stem.removeprefix("plan_")
            if digits.isdigit() and int(digits) >= number and path.suffix in (".json", ".npz"):
                path.unlink()


def _text(points: Sequence[FrontPoint]) -> str:
    return json_text([asdict(point) for point in points])
