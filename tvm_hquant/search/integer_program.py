"""The precisions of least cost under a bound on the sum of losses: an integer program, solved by HiGHS.

    minimize    Σ cost(l, p)·x(l, p)  +  Σ extra(l, p, m, q)·y(l, p, m, q)
    subject to  Σ_p x(l, p) = 1                              for every layer l
                Σ_q y(l, p, m, q) = x(l, p),  Σ_p y(l, p, m, q) = x(m, q)     for all neighbours l, m
                Σ loss(l, p)·x(l, p) ≤ bound
                Σ_l x(l, p) = count(p)                       where levels are prescribed
                x binary, y ≥ 0

y stands for the product x(l, p)·x(m, q): with these two sums, the tightest linear form of a pair, y is 0 or 1 by itself.
Precisions that cost the same beside every precision of a neighbour, such as all that read 8-bit codes, share one y.

HiGHS is called directly: the version inside SciPy 1.17, 1.12, writes lines to the standard output that no option turns off
(ERGO-Code/HiGHS, issue 2783).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

from tvm_hquant.search.problem import CostModel, LayerPrecision

Floats = npt.NDArray[np.float64]

_RELATIVE_GAP = 1e-6
_TIE = 1e-7
"""How much the losses count beside the costs: of two plans of equal cost the one with the smaller loss is taken."""


@dataclass(frozen=True)
class IntegerProgram:
    """Layers, what they cost, and what they lose.

    Attributes:
        candidates: precisions of every layer.
        costs: what is minimized.
        losses: by (layer, precision), not negative; infinite ones are never chosen.
        levels: how many layers have to get each precision that is named, or None.
    """

    candidates: Mapping[str, tuple[str, ...]]
    costs: CostModel
    losses: Mapping[LayerPrecision, float]
    levels: Mapping[str, int] | None = None

    def solve(self, bound: float) -> dict[str, str] | None:
        """The plan of least cost whose losses add up to at most ``bound``; None if there is none."""
        return _Model(self, bound).solve()

    def solve_all(self, bounds: Sequence[float]) -> list[dict[str, str] | None]:
        """:meth:`solve` for several bounds, in their order.

        A plan that is optimal for a bound is so for all smaller ones that it still keeps: those are not solved again.
        """
        found: dict[float, dict[str, str] | None] = {}
        plan: dict[str, str] | None = None
        least = -math.inf
        for number, bound in enumerate(sorted(set(bounds), reverse=True)):
            if number == 0 or (plan is not None and least > bound):
                plan = self.solve(bound)
                least = math.inf if plan is None else sum(self.losses[pair] for pair in plan.items())
            found[bound] = plan
        return [found[bound] for bound in bounds]

    @property
    def pairs(self) -> list[LayerPrecision]:
        """All layers with all their precisions."""
        return [(layer, p) for layer, precisions in self.candidates.items() for p in precisions]

    @property
    def cost_scale(self) -> float:
        """The largest cost of a layer."""
        return max((abs(self.costs.layers[pair]) for pair in self.pairs), default=0.0) or 1.0

    def objective(self) -> Floats:
        """What is minimized for each of :attr:`pairs`: its cost over the largest, and a small part of its loss."""
        costs = np.array([self.costs.layers[pair] for pair in self.pairs])
        losses = np.array([self.losses[pair] for pair in self.pairs])
        finite = np.where(np.isfinite(losses), losses, 0.0)
        return np.asarray(costs / self.cost_scale + _TIE * finite / (finite.max(initial=0.0) or 1.0), np.float64)


class _Model:
    """Variables and constraints of one program; x come first, then y."""

    def __init__(self, program: IntegerProgram, bound: float) -> None:
        self.program = program
        self.x = {pair: number for number, pair in enumerate(program.pairs)}
        self.count = len(self.x)
        self.objective = program.objective().tolist()
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.bound = bound
        for layer, precisions in program.candidates.items():
            self._add({self.x[layer, p]: 1.0 for p in precisions}, 1.0, 1.0)
        self._add_losses()
        for (first, second), extra in program.costs.pairs.items():
            self._add_pair(first, second, extra)
        for precision, wanted in (program.levels or {}).items():
            chosen = {n: 1.0 for (_, p), n in self.x.items() if p == precision}
            self._add(chosen, float(wanted), float(wanted))

    def solve(self) -> dict[str, str] | None:
        if not self.program.candidates:
            return {}
        losses = np.array([self.program.losses[pair] for pair in self.x])
        upper = np.ones(self.count)
        # A loss beyond the bound is never chosen; left to the solver, tiny parts of it would fit its tolerances.
        upper[: len(losses)][~np.isfinite(losses) | (losses > self.bound)] = 0.0
        found = self._optimum(np.array(self.objective), upper)
        if found is None:
            return None
        return {layer: p for (layer, p), number in self.x.items() if found[number] > 0.5}

    def _optimum(self, objective: Floats, upper: Floats) -> Floats | None:
        """The values of all variables at the optimum; None if nothing keeps the constraints."""
        problem = highspy.HighsLp()
        problem.num_col_, problem.num_row_ = self.count, len(self.rows)
        problem.col_cost_, problem.col_lower_, problem.col_upper_ = objective, np.zeros(self.count), upper
        problem.row_lower_ = np.array([low for _, low, _ in self.rows])
        problem.row_upper_ = np.array([high for _, _, high in self.rows])
        matrix = problem.a_matrix_
        matrix.format_ = highspy.MatrixFormat.kRowwise
        matrix.start_ = np.cumsum([0, *(len(row) for row, _, _ in self.rows)])
        matrix.index_ = np.array([column for row, _, _ in self.rows for column in row])
        matrix.value_ = np.array([value for row, _, _ in self.rows for value in row.values()])
        kinds = highspy.HighsVarType
        problem.integrality_ = [kinds.kInteger if n < len(self.x) else kinds.kContinuous for n in range(self.count)]
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("mip_rel_gap", _RELATIVE_GAP)
        solver.passModel(problem)
        solver.run()
        if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            return None
        return np.array(solver.getSolution().col_value)

    def _add(self, row: dict[int, float], low: float, high: float) -> None:
        self.rows.append((row, low, high))

    def _add_losses(self) -> None:
        if math.isinf(self.bound):
            return
        # Scaled so that the solver's tolerance is far below what tells plans apart.
        scale = 1.0 / self.bound if self.bound > 0 else 1e9
        row = {n: self.program.losses[pair] * scale for pair, n in self.x.items()}
        usable = {n: value for n, value in row.items() if value <= self.bound * scale}
        self._add(usable, -np.inf, self.bound * scale)

    def _add_pair(self, first: str, second: str, extra: Mapping[tuple[str, str], float]) -> None:
        if not any(extra.values()) or first not in self.program.candidates or second not in self.program.candidates:
            return
        own, other = self.program.candidates[first], self.program.candidates[second]
        rows = _classes(own, lambda p: tuple(extra.get((p, q), 0.0) for q in other))
        columns = _classes(other, lambda q: tuple(extra.get((p, q), 0.0) for p in own))
        y = {(r, c): self.count + i * len(columns) + j for i, r in enumerate(rows) for j, c in enumerate(columns)}
        scale = self.program.cost_scale
        self.objective += [extra.get((r[0], c[0]), 0.0) / scale for r in rows for c in columns]
        self.count += len(y)
        for r in rows:
            self._add({**{y[r, c]: 1.0 for c in columns}, **{self.x[first, p]: -1.0 for p in r}}, 0.0, 0.0)
        for c in columns:
            self._add({**{y[r, c]: 1.0 for r in rows}, **{self.x[second, q]: -1.0 for q in c}}, 0.0, 0.0)


def _classes(precisions: tuple[str, ...], signature: Callable[[str], object]) -> list[tuple[str, ...]]:
    """Precisions with equal signatures together."""
    found: dict[object, list[str]] = {}
    for precision in precisions:
        found.setdefault(signature(precision), []).append(precision)
    return [tuple(group) for group in found.values()]
