"""How weights are rounded: the choice that a user or a target's rules make for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tvm_hquant.calibration.input_moments import InputMoments
from tvm_hquant.errors import PrecisionError
from tvm_hquant.rounding.point_quantizers import (
    FloorQuantizer,
    NearestQuantizer,
    OutputErrorQuantizer,
    PointQuantizer,
    PowerOfTwoQuantizer,
)
from tvm_hquant.target_spec.schema import Rules

Method = Literal["output-error", "nearest", "floor", "power-of-two"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class WeightRounding:
    """How weights become codes.

    Attributes:
        method: ``output-error`` rounds for the least error of what a layer puts out, where calibration has seen its input, and
            else to nearest; ``nearest``; ``floor``; ``power-of-two``: nearest with steps that are powers of two.
        per_channel: a scale for each output channel; otherwise one for a layer.
    """

    method: Method = "output-error"
    per_channel: bool = True

    def quantizer(self, moments: InputMoments | None) -> PointQuantizer:
        """What makes a point of a layer with these moments."""
        if self.method == "power-of-two":
            return PowerOfTwoQuantizer()
        if self.method == "floor":
            return FloorQuantizer()
        if self.method == "output-error" and moments is not None:
            return OutputErrorQuantizer(moments)
        return NearestQuantizer()


OUTPUT_ERROR = WeightRounding()
"""For the least error of outputs, a scale for each output channel."""
NEAREST = WeightRounding("nearest")
"""To nearest, a scale for each output channel."""


def rounding_for(rules: Rules, method: Method = "output-error") -> WeightRounding:
    """The rounding that a target's rules allow: where all scales are powers of two, there is one method."""
    chosen: Method = "power-of-two" if rules.power_of_two_scales else method
    return WeightRounding(chosen, rules.weight_scales == "per-channel")


def check_method(name: str) -> Method:
    """The method with this name.

    Raises:
        PrecisionError: there is none.
    """
    for method in METHODS:
        if name == method:
            return method
    raise PrecisionError(f"unknown rounding {name!r}: use {', '.join(METHODS)}")
