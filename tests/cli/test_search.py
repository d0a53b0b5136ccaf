"""``hquant search`` writes a front that can be compiled, goes on where it was, and says when a budget cannot be met."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tvm_hquant import quickstart
from tvm_hquant.cli.application import application
from tvm_hquant.cli.search_command import parse_beta, parse_levels
from tvm_hquant.errors import HQuantError, SearchError
from tvm_hquant.front import FrontWriter
from tvm_hquant.plan import load_plan
from tvm_hquant.search.registry import STRATEGIES

POINT = {
    "plan", "cost", "expected_loss", "loss", "loss_interval", "holdout_loss", "holdout_interval", "holdout_expected_loss",
    "divergence", "holdout_divergence", "latency_ms", "latency_source", "bytes", "int8_mac_share", "evaluations",
}  # fmt: skip


def search(folder: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of a search over the included network."""
    arguments = ["search", str(quickstart.model_path()), "--calibration", str(quickstart.calibration_path())]
    arguments += ["--evaluation", str(quickstart.evaluation_path()), "--precisions", "a8w3,a8w8,float32"]
    arguments += ["--workers", "1", "-o", str(folder), *options]
    result = CliRunner().invoke(application, arguments)
    if isinstance(result.exception, HQuantError):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def front_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One search for size."""
    folder = tmp_path_factory.mktemp("front")
    code, output = search(folder, "--strategy", "ilp", "--objective", "size", "--times", "predicted")
    assert code == 0, output
    return folder


def test_front_holds_what_is_promised(front_folder: Path) -> None:
    """Every field, the cheapest plan first, and the files that it names."""
    points = json.loads((front_folder / "front.json").read_text())
    assert len(points) >= 3
    assert all(set(point) == POINT for point in points)
    sizes = [point["bytes"] for point in points]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    for point in points:
        low, high = point["loss_interval"]
        assert low <= point["loss"] <= high
        assert point["holdout_interval"][0] <= point["holdout_loss"] <= point["holdout_interval"][1]
        assert point["latency_source"] == "predicted"
        assert point["latency_ms"] > 0
        assert 0 <= point["int8_mac_share"] <= 1
        assert load_plan(front_folder / point["plan"]).weights, "its own codes lie beside it"
    assert (front_folder / "front.png").read_bytes().startswith(b"\x89PNG")
    names = {path.stem for path in front_folder.glob("plan_*.json")}
    assert names == {Path(point["plan"]).stem for point in points}, "nothing is left over from the way there"


def test_what_the_search_goes_by_is_there(front_folder: Path) -> None:
    """By the cost and the loss that are written no point is dominated; the best one alone may be, where it is surer."""
    points = json.loads((front_folder / "front.json").read_text())
    best = load_plan(front_folder / "best.json").layers
    others = [point for point in points if load_plan(front_folder / point["plan"]).layers != best]
    assert all(a["cost"] < b["cost"] and a["expected_loss"] > b["expected_loss"] for a, b in pairwise(others))
    assert [point["cost"] for point in points] == pytest.approx([point["bytes"] for point in points], abs=1)
    assert all(0 <= point["divergence"] < 10 and 0 <= point["holdout_divergence"] < 10 for point in points)


def test_best_plan_compiles(front_folder: Path, tmp_path: Path) -> None:
    """``compile --plan`` takes it as it is, with the codes that were searched with."""
    folder = tmp_path / "artifact"
    arguments = ["compile", str(quickstart.model_path()), "--plan", str(front_folder / "best.json"), "-o", str(folder)]
    result = CliRunner().invoke(application, arguments)
    assert result.exit_code == 0, result.output
    compiled, best = load_plan(folder / "plan.json"), load_plan(front_folder / "best.json")
    assert compiled.layers == best.layers
    assert {n: w.digest for n, w in compiled.weights.items()} == {n: w.digest for n, w in best.weights.items()}


def test_second_search_finds_the_same_and_measures_nothing(
    front_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the journal of the first one nothing is run any more, and the front is the same to the bit."""

    def refuse(*_arguments: object) -> None:
        raise AssertionError("a chunk was scored again")

    monkeypatch.setattr("tvm_hquant.simulator.chunks.ProgramSet.score", refuse)
    options = ["--strategy", "ilp", "--objective", "size", "--times", "predicted"]
    code, output = search(tmp_path / "again", *options, "--journal", str(front_folder / "journal.sqlite"))
    assert code == 0, output
    assert (tmp_path / "again" / "front.json").read_bytes() == (front_folder / "front.json").read_bytes()


def test_killed_search_leaves_nothing_of_an_earlier_one(
    front_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies in the folder belongs together at any time: no best plan, plot or weights of another search."""
    folder = tmp_path / "front"
    shutil.copytree(front_folder, folder)

    def killed(*_arguments: object) -> None:
        raise SearchError("killed")

    monkeypatch.setattr(FrontWriter, "write", killed)
    with pytest.raises(SearchError, match="killed"):
        search(folder, "--strategy", "one-shot", "--objective", "size", "--times", "predicted")
    points = json.loads((folder / "front.json").read_text())
    assert all(point["holdout_loss"] is None for point in points)
    plans = {point["plan"] for point in points}
    assert {path.name for path in folder.iterdir()} == {"front.json", "journal.sqlite", *plans}
    assert all(not load_plan(folder / plan).weights for plan in plans)


def test_budget_that_cannot_be_met(front_folder: Path, tmp_path: Path) -> None:
    """Exit code 3, the best plan that was found, and the words."""
    options = ["--strategy", "one-shot", "--objective", "size", "--times", "predicted", "--max-drop", "-1"]
    code, output = search(tmp_path / "front", *options, "--journal", str(front_folder / "journal.sqlite"))
    assert code == 3
    assert "no plan kept the loss budget" in output
    assert (tmp_path / "front" / "best.json").is_file()


def test_wrong_options_say_what_is_right(tmp_path: Path) -> None:
    """Names of strategies and objectives, and the form of levels."""
    with pytest.raises(SearchError, match="latency, size, macs"):
        search(tmp_path / "front", "--objective", "energy")
    with pytest.raises(SearchError, match="float32:4,bfloat16:8"):
        parse_levels("float32=4")
    with pytest.raises(SearchError, match="float32:4,bfloat16:8"):
        parse_levels("float32:²")
    with pytest.raises(SearchError, match="twice"):
        parse_levels("fp32:4,float32:2")
    with pytest.raises(SearchError, match="cannot prescribe levels"):
        search(tmp_path / "front", "--strategy", "greedy", "--levels", "a8w8:12")
    with pytest.raises(SearchError, match="a8w4"):
        search(tmp_path / "front", "--levels", "a8w4:6,a8w8:6")
    with pytest.raises(SearchError, match=r"0\.025, or tuned"):
        search(tmp_path / "front", "--strategy", "greedy", "--beta", "auto")
    with pytest.raises(SearchError, match="strategy ilp has no beta"):
        search(tmp_path / "front", "--beta", "tuned")
    assert parse_beta("tuned") is None
    assert parse_beta("0.02") == 0.02
    assert parse_levels("fp32:4, uint8:2") == {"float32": 4, "a8w8": 2}
    assert {"one-shot", "hierarchical", "greedy", "lazy-greedy", "ilp"} <= set(STRATEGIES)


def test_a_refused_search_leaves_no_folder(tmp_path: Path) -> None:
    """An unknown strategy is found before any work, and nothing half-made stays behind."""
    with pytest.raises(SearchError, match="unknown strategy"):
        search(tmp_path / "front", "--strategy", "nosuch")
    assert not (tmp_path / "front").exists()
