"""All plans that a search has evaluated, and the best of them: the Pareto front of cost and loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm_hquant.search.problem import Assignment
from tvm_hquant.statistics import Interval


@dataclass(frozen=True)
class EvaluatedPlan:
    """One joint evaluation on the search samples.

    Attributes:
        assignment: precision by layer.
        cost: in the unit of the objective.
        expected: the loss that searches go by.
        loss: the measured loss with its interval.
        smooth: the smooth loss (:mod:`tvm_hquant.search.joint_losses`).
        divergence: the mean of what that is made of.
        stored_bits: of the weights in the artifact, where a layer's precision has more; None: as many as that.
        number: how many plans the search had asked for with this one, single layers among them.
    """

    assignment: Assignment
    cost: float
    expected: float
    loss: Interval
    smooth: float
    divergence: float
    stored_bits: int | None = None
    number: int = 0


class PlanArchive:
    """Collects evaluations; ``on_change`` is called with the front when it has changed.

    A plan is on the front if no other one costs less or the same and is expected to lose less or the same.
    """

    def __init__(self) -> None:
        self._plans: dict[tuple[object, ...], EvaluatedPlan] = {}
        self.on_change: Callable[[tuple[EvaluatedPlan, ...]], None] | None = None
        self._front: tuple[EvaluatedPlan, ...] = ()

    def add(self, plans: list[EvaluatedPlan]) -> None:
        """Adds evaluations; a plan that is known already counts once."""
        for plan in plans:
            self._plans.setdefault(_key(plan.assignment, plan.stored_bits), plan)
        front = pareto_front(tuple(self._plans.values()))
        if front != self._front:
            self._front = front
            if self.on_change is not None:
                self.on_change(front)

    def find(self, assignment: Assignment, stored_bits: int | None = None) -> EvaluatedPlan | None:
        """The evaluation of an assignment; None if there was none."""
        return self._plans.get(_key(assignment, stored_bits))

    @property
    def plans(self) -> tuple[EvaluatedPlan, ...]:
        """All, in the order in which they were evaluated."""
        return tuple(self._plans.values())

    @property
    def front(self) -> tuple[EvaluatedPlan, ...]:
        """The best ones, the cheapest first."""
        return self._front


def _key(assignment: Assignment, stored_bits: int | None) -> tuple[object, ...]:
    return (stored_bits, *sorted(assignment.items()))


def pareto_front(plans: tuple[EvaluatedPlan, ...]) -> tuple[EvaluatedPlan, ...]:
    """The plans that no other one dominates, the cheapest first; of equal ones the first."""
    front: list[EvaluatedPlan] = []
    for plan in sorted(plans, key=lambda p: (p.cost, p.expected)):
        if not front or plan.expected < front[-1].expected:
            front.append(plan)
    return tuple(front)
