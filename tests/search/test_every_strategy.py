"""What every strategy promises, on real networks of a few layers: the same plan again, an answer where no plan keeps the
budget, networks of one layer, and layers that may not change."""

from __future__ import annotations

from functools import cache

import pytest
from tvm.script import ir as I
from tvm.script import relax as R

from tests.planned_models import host_spec, new_session, random_samples, shared_session
from tests.small_models import with_weights
from tvm_hquant.calibration.data import open_data
from tvm_hquant.passes.partition_layers import partition_layers
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.search.registry import STRATEGIES
from tvm_hquant.session import QuantizationSession


@I.ir_module
class _OneLayer:
    @R.function
    def main(x: R.Tensor((1, 6), "float32"), weight: R.Tensor((6, 5), "float32")) -> R.Tensor((1, 5), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            logits = R.matmul(x, weight)
            R.output(logits)
        return logits


@cache
def one_layer() -> QuantizationSession:
    return new_session(partition_layers()(with_weights(_OneLayer, ["logits"])))


@cache
def partly_forbidden() -> QuantizationSession:
    """The residual network on a target that keeps its first layer in float."""
    rules = host_spec().rules.model_copy(update={"keep_float": ("conv1",)})
    return new_session(shared_session("residual").mod, host_spec().model_copy(update={"rules": rules}))


def quantizer_of(session: QuantizationSession, budget: float, **options: object) -> Quantizer:
    samples = open_data(random_samples(session, 6, seed=3), session.signature)
    wanted = Options("kl", budget, ("a8w2", "a8w8", "float32"), objective="size", baselines=False, **options)  # type: ignore[arg-type]
    return Quantizer(session, DataRoles(samples, samples, samples, 0), wanted)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_plan_again(name: str) -> None:
    """Deterministic for a seed, within the budget if it says so, and what the spec forbids or the user fixed is as it was."""
    fixed = {"head": "a8w8"}
    quantizer = quantizer_of(partly_forbidden(), 0.05, fixed=fixed)
    found = quantizer.search(name)
    assert found == quantizer_of(partly_forbidden(), 0.05, fixed=fixed).search(name)
    assert found.within_budget
    assert found.loss <= 0.05
    assert (found.decisions["conv1"].precision, found.decisions["conv1"].reason) == ("float32", "the spec forbids")
    assert (found.decisions["head"].precision, found.decisions["head"].reason) == ("a8w8", "chosen by the user")


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_budget_that_no_plan_keeps(name: str) -> None:
    """The answer is the best plan that was found, and says that it is not good enough."""
    quantizer = quantizer_of(partly_forbidden(), 0.0, fixed={"head": "a8w2"})
    found = quantizer.search(name)
    assert not found.within_budget
    best = min(plan.expected for plan in quantizer.archive.plans)
    chosen = quantizer.archive.find({layer: d.precision for layer, d in found.decisions.items()})
    if name == "after-storage":  # Its plans say in how many bits weights are stored.
        chosen = min(quantizer.archive.plans, key=lambda plan: plan.expected)
    assert chosen is not None
    assert chosen.expected == pytest.approx(best, rel=0.2 if name == "ilp" else 1e-9)  # ilp keeps samples back.


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_layer(name: str) -> None:
    """There is something to choose, and no neighbour."""
    quantizer = quantizer_of(one_layer(), 1e-9)
    found = quantizer.search(name)
    assert list(found.decisions) == [layer.name for layer in one_layer().graph.anchors]
    assert len(found.decisions) == 1
    assert found.within_budget == (found.loss <= 1e-9)
