"""Power-of-two steps as the greedy paper defines them: protects equations 4, 5 and 7 against cases worked out by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.planned_models import shared_session
from tvm_hquant.layers import Layer
from tvm_hquant.precision import parse_precision
from tvm_hquant.rounding.power_of_two import power_of_two_weights


def layer_of(weights: np.ndarray) -> Layer:
    """A layer with these weights [out, in]; of the operator only the weights matter here."""
    operator = shared_session("residual").graph.anchors[0].operator
    return Layer(
        "dense", "dense", operator, ("x",), weights[:, :, None, None].astype(np.float32), np.zeros(len(weights))
    )


def test_by_hand() -> None:
    """Four bits, a range of 3: ⌈log₂(3/15)⌉ = −2, so a step of 1/4; ties go to even codes."""
    found = power_of_two_weights(layer_of(np.array([[-1.0, 2.0, 0.125, 0.375]])), parse_precision("a8w4"))
    assert found.scales.tolist() == [[0.25]]
    assert found.codes.reshape(-1).tolist() == [-4, 8, 0, 2]


@given(hnp.arrays(np.int16, (3, 6), elements=st.integers(-6400, 6400)), st.integers(2, 8))
@settings(max_examples=100, deadline=None)
def test_steps_and_codes_are_within_their_bounds(numerators: np.ndarray, bits: int) -> None:
    """Steps are powers of two; a channel has at most 2^b codes within −127 … 127; errors are below a step."""
    weights = numerators.astype(np.float32) / 64
    found = power_of_two_weights(layer_of(weights), parse_precision(f"a8w{bits}"))
    mantissa, _ = np.frexp(found.scales)
    assert (mantissa == 0.5).all()
    codes = found.codes.reshape(3, 6).astype(int)
    assert np.abs(codes).max() <= 127
    assert (codes.max(axis=1) - codes.min(axis=1) <= 2**bits - 1).all()
    # Half a step by rounding, and as much again where a range just fits and both its ends are rounded away from it.
    assert (np.abs(codes * found.scales.T - weights) <= found.scales.T).all()
