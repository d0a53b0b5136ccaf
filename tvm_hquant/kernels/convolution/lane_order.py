"""Which output channel each lane of a tile's vectors computes, and which group that belongs to."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm_hquant.kernels.epilogues.packed_epilogue import channel_order

LaneNumbers = tuple[tuple[int, ...], ...]
"""For every vector a number for each of its lanes."""


def place_of_channel(channel: Any, channels: int, groups: int) -> Any:
    """Where a channel, a number or an expression, is stored if groups of all take turns; with one group there is no change."""
    return channel % (channels // groups) * groups + channel // (channels // groups)


def channel_at_place(place: Any, channels: int, groups: int) -> Any:
    """The reverse, for numbers or arrays of them."""
    return place_of_channel(place, channels, channels // groups)


@cache
def lane_channels(vectors: int, channels: int, lanes: int, packs_codes: bool) -> LaneNumbers:
    """The place in memory of the channel in every lane, from the first of a tile over ``channels``.

    Where the vectors have more lanes than that, the last ones are moved back to end with them; the lanes of a vector that is
    wider than all channels have places behind them.
    """
    if packs_codes:
        return tuple(tuple(map(int, places)) for places in channel_order(vectors, channels, lanes))
    starts = [max(min(j * lanes, channels - lanes), 0) for j in range(vectors)]
    return tuple(tuple(range(start, start + lanes)) for start in starts)


@cache
def lane_turns(vectors: int, channels: int, lanes: int, packs_codes: bool, groups: int) -> LaneNumbers:
    """The group of every lane's channel, where the channels in memory take turns among ``groups``."""
    of_lanes = lane_channels(vectors, channels, lanes, packs_codes)
    return tuple(tuple(place % groups for place in places) for places in of_lanes)
