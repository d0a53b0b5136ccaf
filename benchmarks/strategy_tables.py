"""The tables of docs/search.md, in Markdown, from the folders that `benchmarks.search_strategies` wrote.

A folder may have a label, which stands behind the names of its networks:

    python -m benchmarks.strategy_tables FOLDER LATENCY_FOLDER="latency on AVX2"
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.search_strategies import OURS
from benchmarks.strategy_fronts import SAME_COST, StrategyFront, better_than, equal_evaluations, loss_ratio, read_front
from tvm_hquant.search.registry import STRATEGIES

OTHERS = tuple(name for name in STRATEGIES if name != OURS)
SEARCHED = ("one-shot", "hierarchical", "lazy-greedy", "greedy")
"""Those that evaluate more than a handful of plans."""
CHOSEN = (OURS, "hierarchical", "lazy-greedy", "greedy", "multipoint")


@dataclass(frozen=True)
class NetworkFronts:
    """All fronts of a network, by strategy."""

    title: str
    fronts: Mapping[str, StrategyFront]

    @property
    def ours(self) -> StrategyFront:
        return self.fronts[OURS]

    @property
    def samples(self) -> int:
        """For the search and held out, half each."""
        return 2 * len(self.ours.plans[0].divergence)


def main() -> None:
    """Prints four tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="a folder, or FOLDER=LABEL")
    networks = sorted(
        (found for folder in parser.parse_args().folders for found in read_folder(folder)),
        key=lambda network: ("," in network.title, network.ours.layers, network.title),
    )
    for columns, row in (
        (("layers", "samples", *_code((*SEARCHED, OURS))), evaluations_row),
        (_code(SEARCHED), equal_evaluations_row),
        (_code(OTHERS), dominance_row),
        (_code(CHOSEN), chosen_row),
    ):
        print_markdown(("network", *columns), [(network.title, *row(network)) for network in networks])


def read_folder(argument: str) -> list[NetworkFronts]:
    """Every network of a folder that all strategies have been run on."""
    folder, _, label = argument.partition("=")
    found: list[NetworkFronts] = []
    for own in sorted(Path(folder).iterdir()):
        files = {name: own / f"{name}.json" for name in STRATEGIES}
        if all(file.exists() for file in files.values()):
            title = f"{own.name}, {label}" if label else own.name
            found.append(NetworkFronts(title, {name: read_front(file) for name, file in files.items()}))
    return found


def evaluations_row(network: NetworkFronts) -> list[str]:
    """Layers, samples, and how many plans each strategy evaluated."""
    counts = [network.fronts[name].evaluations for name in (*SEARCHED, OURS)]
    return [str(number) for number in (network.ours.layers, network.samples, *counts)]


def equal_evaluations_row(network: NetworkFronts) -> list[str]:
    """How many times the loss of ours each front has after as many evaluations, and how many these are."""
    cells: list[str] = []
    for name in SEARCHED:
        both = equal_evaluations(network.ours, network.fronts[name], network.fronts.values())
        ratio = loss_ratio(both.theirs, both.ours, both.cheapest)
        cells.append(f"{ratio.estimate:.2f} ({ratio.low:.2f} … {ratio.high:.2f}) [{both.evaluations}]")
    return cells


def dominance_row(network: NetworkFronts) -> list[str]:
    """Of how many points: how many are surely better than ours, among all at once, and at half a percent of cost."""
    ours = network.ours.after(network.ours.evaluations)
    cells: list[str] = []
    for name in OTHERS:
        plans = network.fronts[name].after(network.fronts[name].evaluations)
        verdicts, nearly = better_than(ours, plans, "divergence"), better_than(ours, plans, "divergence", SAME_COST)
        better = [sum(verdicts.surely), sum(verdicts.among_all), sum(nearly.among_all)]
        cells.append(f"{', '.join(map(str, better)) if any(better) else 0} of {len(plans)}")
    return cells


def chosen_row(network: NetworkFronts) -> list[str]:
    """Cost of the plan chosen for the budget, and points of top-1 that it loses on the held-out samples."""
    cells: list[str] = []
    for name in CHOSEN:
        front = network.fronts[name]
        lost = 100 * float(np.mean(front.plans[front.chosen].top1_lost))
        points = f"{lost + 0.0:.1f}".replace("-", "−")
        cells.append(f"{front.plans[front.chosen].cost:.3f}, {points}" if front.within_budget else "none")
    return cells


def print_markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One table, and an empty line."""
    print(f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", sep="\n")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def _code(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"`{name}`" for name in names)


if __name__ == "__main__":
    main()
