"""Power-of-two steps as the greedy paper defines them: protects equations 4, 5 and 7 against cases worked out by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tvm_hquant.rounding.power_of_two import power_of_two_codes


def test_by_hand() -> None:
    """Four bits, a range of 3: ⌈log₂(3/15)⌉ = −2, so a step of 1/4; ties go to even codes."""
    codes, steps = power_of_two_codes([[-1.0, 2.0, 0.125, 0.375]], 4)
    assert steps.tolist() == [0.25]
    assert codes.tolist() == [[-4, 8, 0, 2]]


def test_small_ranges_far_from_zero() -> None:
    """A range of 1/64 alone would have steps of 2⁻¹³, in which 1/32 is 256: two doublings bring it to 64."""
    codes, steps = power_of_two_codes([[1 / 64, 1 / 32]], 8)
    assert steps.tolist() == [2.0**-11]
    assert codes.tolist() == [[32, 64]]


@given(hnp.arrays(np.int16, (3, 6), elements=st.integers(-6400, 6400)), st.integers(2, 8), st.booleans())
@settings(max_examples=100, deadline=None)
def test_steps_and_codes_are_within_their_bounds(numerators: np.ndarray, bits: int, tied: bool) -> None:
    """Steps are powers of two; a channel has at most 2^b codes within −127 … 127; errors are below a step."""
    weights = numerators.astype(np.float64) / 64
    codes, steps = power_of_two_codes(weights, bits, tied)
    mantissa, _ = np.frexp(steps)
    assert (mantissa == 0.5).all()
    assert not tied or (steps == steps[0]).all()
    assert np.abs(codes).max() <= 127
    assert (codes.max(axis=1) - codes.min(axis=1) <= 2**bits - 1).all()
    # Half a step by rounding, and as much again where a range just fits and both its ends are rounded away from it.
    assert (np.abs(codes * steps[:, None] - weights) <= steps[:, None]).all()
