"""Programs share values and memory: protects that sharing never changes a bit of what a program gives alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planned_models import (
    PRECISIONS,
    built_outputs,
    host_spec,
    named_plan,
    new_session,
    one_sample,
    partitioned,
    random_samples,
    shared_session,
)
from tvm_hquant import numerics
from tvm_hquant.calibration.data import open_data
from tvm_hquant.compilation import lower
from tvm_hquant.errors import DataError
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.precision import FLOAT32, parse_precision
from tvm_hquant.relax_ir.kernel_calls import is_view
from tvm_hquant.session import QuantizationSession
from tvm_hquant.simulator.engine import SimulationEngine
from tvm_hquant.simulator.metrics import METRICS
from tvm_hquant.simulator.program import Program

Array = npt.NDArray[Any]
BRANCH_ANCHORS = ("stem", "left", "right", "merge")


def branches_program(session: QuantizationSession, names: tuple[str, ...]) -> Program:
    """The program in which the four convolutions have the named precisions."""
    return session.program(dict(zip(BRANCH_ANCHORS, map(parse_precision, names), strict=True)))


def run_alone(session: QuantizationSession, program: Program, sample: dict[str, Array]) -> tuple[Array, ...]:
    """Outputs of a program in an engine that has no buffers from before."""
    engine = SimulationEngine(session.mod, families_for_target(host_spec().instruction_sets), host_spec().tvm_target())
    engine.compile([program])
    return engine.run(sample, [program])[0]


def assert_same(ours: tuple[Array, ...], theirs: tuple[Array, ...]) -> None:
    """All outputs are equal bit for bit."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def test_every_step_is_what_the_contract_says() -> None:
    """The tensors inside a program, not only its outputs, are those of the NumPy oracle."""
    session = shared_session("branches")
    plan = named_plan("branches", "mixed")
    program = session.builder.program(plan.precisions(), plan.scales, plan.layer_weights)
    session.engine.compile([program])
    sample = one_sample(session)
    values = dict(enumerate(sample.values()))
    compared = 0
    made = session.engine.step_values(sample, program)
    for step, actual in zip(program.steps, made, strict=True):
        if step.request is not None and not is_view(step.request):
            assert step.constants is not None
            expected = numerics.evaluate(step.request, step.constants, [values[key] for key in step.inputs])
            np.testing.assert_array_equal(actual, expected, f"{step.tensor} in {step.format}")
            compared += 1
        values[step.key] = np.array(actual)
    assert compared >= 10


def test_candidates_that_differ_in_one_layer_give_the_same_as_alone() -> None:
    """Values of the first program are reused for the others, but only up to the layer where they part."""
    session = shared_session("residual")
    floats = {layer.name: FLOAT32 for layer in session.graph.anchors}
    candidates = [
        session.program({**floats, layer: parse_precision(p)}) for layer in floats for p in ("a8w8", "bfloat16")
    ]
    sample = one_sample(session)
    session.engine.compile([session.float_program, *candidates])
    together = session.engine.run(sample, [session.float_program, *candidates])
    for program, outputs in zip([session.float_program, *candidates], together, strict=True):
        assert_same(outputs, run_alone(session, program, sample))
    assert len({outputs[0].tobytes() for outputs in together}) == len(together), "the candidates do differ"


def test_shared_steps_have_one_key() -> None:
    """What makes a candidate cheap: everything before its one changed layer is the float program's own."""
    session = shared_session("residual")
    floats = {layer.name: FLOAT32 for layer in session.graph.anchors}
    candidate = session.program({**floats, "head": parse_precision("a8w8")})
    known = {step.key for step in session.float_program.steps}
    new = [(step.tensor, step.layer is None) for step in candidate.steps if step.key not in known]
    assert new == [("max_pool2d_0", True), ("global_average_pool_0", False), ("reshape_0", False), ("head", False)]


random_plans = st.lists(st.tuples(*[st.sampled_from(PRECISIONS)] * len(BRANCH_ANCHORS)), min_size=2, max_size=5)


@given(random_plans, st.integers(0, 2))
@settings(max_examples=8, deadline=None)
def test_pooled_buffers_do_not_leak_between_programs(plans: list[tuple[str, ...]], seed: int) -> None:
    """Random plans in random order through one engine, on random samples: each gives what it gave as the only one."""
    session = shared_session("branches")
    programs = [branches_program(session, names) for names in plans]
    session.engine.compile(programs)
    sample = one_sample(session, seed)
    together = session.engine.run(sample, programs)
    alone = [session.engine.run(sample, [program])[0] for program in reversed(programs)]
    for ours, theirs in zip(together, reversed(alone), strict=True):
        assert_same(ours, theirs)


def test_engine_with_a_history_equals_a_fresh_one() -> None:
    """After all those programs the buffers are full of others' values: a fresh engine must not know better."""
    session = shared_session("branches")
    sample = one_sample(session)
    programs = [branches_program(session, (p,) * 4) for p in ("a16w8", "a8w8", "float16")]
    session.engine.compile(programs)
    session.engine.run(sample, programs)
    for program in programs[::-1][:2]:
        assert_same(session.engine.run(sample, [programs[0], program])[1], run_alone(session, program, sample))


def test_outputs_are_copies() -> None:
    """The next sample must not overwrite what was given out: metrics compare outputs after the walk."""
    session = shared_session("residual")
    first, second = one_sample(session, 1), one_sample(session, 2)
    program = session.program(session.uniform(parse_precision("a8w8")))
    session.engine.compile([session.float_program, program])
    given_out = session.engine.run(first, [session.float_program, program])
    copies = [tuple(np.array(o) for o in outputs) for outputs in given_out]
    session.engine.run(second, [program, session.float_program])
    for ours, theirs in zip(given_out, copies, strict=True):
        assert_same(ours, theirs)


def test_views_share_memory_and_stay_right() -> None:
    """A reshape copies nothing, in the first program and in the others, and the memory under it is not given away."""
    session = shared_session("branches")
    program = branches_program(session, ("a8w8",) * 4)
    assert any(step.request is not None and is_view(step.request) for step in program.steps)
    session.engine.compile([session.float_program, program])
    sample = one_sample(session)
    for _ in range(3):
        results = session.engine.run(sample, [session.float_program, program, program, session.float_program])
        assert_same(results[1], results[2])
        assert_same(results[0], results[3])
    assert_same(results[1], run_alone(session, program, sample))


def test_memory_does_not_grow_with_samples() -> None:
    """The number of buffers is the same after two samples and after twenty."""
    session = shared_session("branches")
    programs = [session.float_program, *(branches_program(session, (p,) * 4) for p in ("a8w8", "a16w8", "float16"))]
    session.engine.compile(programs)
    for seed in range(2):
        session.engine.run(one_sample(session, seed), programs)
    before = session.engine.machine.buffers
    for seed in range(20):
        session.engine.run(one_sample(session, seed), programs)
    assert session.engine.machine.buffers == before > 0


def test_a_plan_is_simulated_with_its_own_weights() -> None:
    """A plan.npz that another method made, or an older calibration: what is measured is what would be compiled."""
    session = shared_session("residual")
    plan = named_plan("residual", "a8w8")
    weights = plan.weights["conv1"]
    other = replace(plan, weights={**plan.weights, "conv1": replace(weights, bias=weights.bias + np.float32(1))})
    programs = [session.builder.program(p.precisions(), p.scales, p.layer_weights) for p in (plan, other)]
    session.engine.compile(programs)
    own, others = session.engine.run(one_sample(session), programs)
    assert not np.array_equal(own[0], others[0])
    lowered = lower(session.mod, other, session.spec, families_for_target(session.spec.instruction_sets))
    np.testing.assert_array_equal(built_outputs(lowered, *one_sample(session).values())[0], others[0])
    same = session.program({layer.name: parse_precision("a8w8") for layer in session.graph.anchors})
    assert [step.key for step in same.steps] == [step.key for step in programs[0].steps], "equal codes, equal values"


def test_kernels_are_compiled_once() -> None:
    """Asking again compiles nothing, whatever the plan's scales."""
    session = shared_session("branches")
    programs = [branches_program(session, names) for names in [("a8w8",) * 4, ("a16w8", "int8", "a8w8", "float16")]]
    session.engine.compile(programs)
    assert session.engine.compile(programs) == 0


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_bad_activations_name_tensor_and_sample() -> None:
    """A model that overflows on one calibration sample: which tensor, which sample, from which source."""
    session = new_session(partitioned("residual"))
    data = random_samples(session, 3)
    data["x"][1] = 3e38
    with pytest.raises(DataError, match=r"calibration sample 1 of the data: tensor conv1: holds NaN or infinity"):
        session.calibrate(open_data(data, session.signature))


def test_evaluation_is_the_metric_over_all_samples() -> None:
    """A session's loss is the metric of outputs of the engine, sample by sample."""
    session = shared_session("residual")
    data = open_data(random_samples(session, 5, seed=9), session.signature)
    program = session.program(session.uniform(parse_precision("a8w2")))
    found = session.evaluate([session.float_program, program], data, METRICS["mse"], "measuring")
    differences = []
    for sample in data:
        reference, outputs = session.engine.run(sample.inputs, [session.float_program, program])
        differences.append(np.mean((reference[0].astype(np.float64) - outputs[0]) ** 2))
    assert found[0].loss == 0
    assert found[1].loss == pytest.approx(np.mean(differences), rel=1e-12)
    assert found[1].loss > 0


def test_layer_times_cover_every_kernel() -> None:
    """Profiles time each kernel of a program on real values; views and TVM's own operators have no time of their own."""
    session = shared_session("branches")
    program = branches_program(session, ("a8w8",) * 4)
    times = session.engine.time_layers(one_sample(session), program, repeat=2)
    assert set(times) == set(session.graph.by_name) - {"reshape_0", "power_0"}
    assert all(t > 0 for t in times.values())
    assert set(session.engine.time_layers(one_sample(session), program, only="merge", repeat=1)) == {"merge"}
