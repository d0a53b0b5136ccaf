"""Ends of integer layers with uint8 codes, for tests of kernels: zero points, limits, and values that leave int16 or int32."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from tvm_hquant.kernels.interface import IntegerAnchorConstants, Requantization


@dataclass(frozen=True)
class CodeEnding:
    """What a layer's constants are given in place of their own end.

    Attributes:
        end: limits and zero point.
        steepness: what the multipliers of single output channels are multiplied by.
    """

    end: Requantization
    steepness: tuple[float, ...]

    def of(self, constants: IntegerAnchorConstants) -> IntegerAnchorConstants:
        """The constants with this end."""
        multiplier = np.asarray(constants.multiplier)
        steep = np.resize(np.array(self.steepness, np.float32), multiplier.shape)
        return replace(constants, requantization=self.end, multiplier=multiplier * steep)


@st.composite
def code_endings(draw: st.DrawFn) -> CodeEnding:
    """Whole ranges and limits inside the codes, zero points 0 and others; some channels leave int16, and some int32."""
    zero_point = draw(st.sampled_from([0, 0, 1, 77, 128, 255]))
    first, last = draw(st.sampled_from([(0, 255), (0, 255), (0, 200), (9, 255), (30, 90), (zero_point, 255)]))
    steepness = draw(st.sampled_from([(1.0,), (1.0, 1e3, 3.0), (1e8, 1.0, 1e3)]))
    return CodeEnding(Requantization(float(first - zero_point), float(last - zero_point), zero_point), steepness)
