"""Weights come to the cache before they are needed: all of them, and not much more."""

from hypothesis import given
from hypothesis import strategies as st

from tvm_hquant.kernels.tile_order import weights_ahead


@given(
    step_weights=st.sampled_from((8, 24, 48, 64, 128, 256, 384)),
    tiles=st.integers(2, 300),
    steps_of_a_tile=st.integers(8, 64),
    line=st.sampled_from((16, 32, 64)),
)
def test_tiles_ask_for_all_weights_of_the_next_channels(
    step_weights: int, tiles: int, steps_of_a_tile: int, line: int
) -> None:
    elements, steps = weights_ahead(step_weights, tiles, line)
    lines = set()
    for number in range(tiles):
        first = number * steps_of_a_tile // steps * elements
        for step in range(steps_of_a_tile):
            at = first + step // steps * elements
            lines.update((at + offset) // line for offset in range(0, elements, line))
    wanted = -(-step_weights * steps_of_a_tile // line)
    # A last line may be left to the step that reads it; the first one that is asked for is always the first.
    assert {number for number in range(wanted) if number not in lines} <= {wanted - 1}
    assert len(lines) <= 1.3 * wanted + 4
