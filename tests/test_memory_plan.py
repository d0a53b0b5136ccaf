"""Blocks of memory that tensors share: none may overwrite another that is still read, and little memory is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_hquant.memory_plan import Lifetime, largest_set, plan_blocks

lifetimes = st.lists(
    st.tuples(st.integers(1, 1000), st.integers(0, 20), st.integers(0, 6)).map(
        lambda t: Lifetime(t[0], t[1], t[1] + t[2])
    ),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(lifetimes)
def test_tensors_that_live_together_have_blocks_of_their_own(tensors: list[Lifetime]) -> None:
    """For all pairs, by definition; every block holds each of its tensors, and none is larger than its largest one."""
    plan = plan_blocks(tensors)
    assert largest_set(tensors) <= sum(plan.sizes) <= sum(tensor.size for tensor in tensors)
    for number, size in enumerate(plan.sizes):
        assert max(t.size for t, block in zip(tensors, plan.blocks, strict=True) if block == number) == size
    for i, (own, block) in enumerate(zip(tensors, plan.blocks, strict=True)):
        for other, others_block in list(zip(tensors, plan.blocks, strict=True))[:i]:
            assert block != others_block or own.first > other.last or other.first > own.last


def test_a_chain_by_hand() -> None:
    """1280 and 640 live apart and share; 320 meets 1280, 128 meets both 640 and 320, 64 lives beside 640 alone.

    Two blocks in turns would take 1920 bytes, one for each tensor 2432.
    """
    sizes = [64, 640, 128, 320, 1280]
    plan = plan_blocks([Lifetime(size, step, step + 1) for step, size in enumerate(sizes)])
    assert plan.sizes == (1280, 320, 128)
    assert plan.blocks == (2, 0, 2, 1, 0)


def test_nothing_takes_nothing() -> None:
    """A function without intermediate tensors."""
    assert plan_blocks([]).sizes == ()
    assert largest_set([]) == 0
