"""What a report says of a plan's layers."""

from __future__ import annotations

from tests.planned_models import mixed_plan, new_session, partitioned, random_samples
from tvm_hquant.calibration.data import open_data
from tvm_hquant.quantizer import DataRoles, Options, Quantizer
from tvm_hquant.target_spec import load_target_spec


def test_layers_within_a_bound_are_told_from_bit_exact_ones() -> None:
    """A loss is simulated in the arithmetic of the contract: where a unit is only within a bound of it, the report says so."""
    session = new_session(partitioned("residual"), load_target_spec("cuda-sm90"))
    samples = open_data(random_samples(session, 2), session.signature)
    quantizer = Quantizer(session, DataRoles(samples, samples, samples, 0), Options("kl", 1.0, baselines=False))
    report = quantizer.report(mixed_plan(session, {"conv1": "float16", "conv2": "a8w8"}), "residual")
    assert {layer.name for layer in report.layers if not layer.bit_exact} == {"conv1"}


def test_layers_that_the_spec_keeps_in_float_say_so() -> None:
    """Whatever a search makes of them: a reader must not look for the budget's reasons where the spec decided."""
    host = load_target_spec("host")
    spec = host.model_copy(update={"rules": host.rules.model_copy(update={"keep_float": ("conv1",)})})
    session = new_session(partitioned("residual"), spec)
    samples = open_data(random_samples(session, 2), session.signature)
    roles = DataRoles(samples, samples, samples, 0)
    quantizer = Quantizer(session, roles, Options("kl", 1e9, ("a8w8", "float32"), baselines=False))
    reasons = {layer: decision.reason for layer, decision in quantizer.search("hierarchical").decisions.items()}
    assert reasons == {"conv1": "the spec forbids", "conv2": "within budget", "head": "within budget"}
