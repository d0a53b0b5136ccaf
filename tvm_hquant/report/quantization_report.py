"""What a quantization did, as data: for tables, pages and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tvm_hquant.statistics import Interval


@dataclass(frozen=True)
class LayerReport:
    """One layer: its precision and why, its size, and the loss of the network with this layer alone in a precision.

    ``bit_exact`` is False where the target's unit for it is within a bound of what was simulated, not the same bit for bit.
    """

    name: str
    operator: str
    precision: str
    reason: str
    detail: str
    macs: int
    weight_bytes: float
    losses: Mapping[str, float] = field(default_factory=dict)
    bit_exact: bool = True


@dataclass(frozen=True)
class ModelRow:
    """One way to quantize the whole model, measured on the held-out samples.

    ``loss`` is measured; ``expected`` is what a search would expect: another figure for top-1
    (:mod:`tvm_hquant.search.expected_drop`), which scatters less. ``remark`` says ``not deployable here`` where
    the target forbids it, or how many layers stayed in float.
    ``low_bit_macs`` is the share of multiply-accumulates in 8 bits or fewer.
    """

    name: str
    value: float
    loss: Interval
    expected: float
    agreement: float
    low_bit_macs: float
    weight_bytes: float
    conversions: int
    remark: str = ""


@dataclass(frozen=True)
class SampleCounts:
    """How many samples went where. No sample is in two places; ``shared`` counts equal ones found in both files."""

    calibration: int
    search: int
    held_out: int
    shared: int = 0


@dataclass(frozen=True)
class QuantizationReport:
    """The whole report.

    ``rows`` starts with the float model and ends with the plan that was made. ``within_budget`` is None where no budget was
    searched for. ``remark`` is that of the search.
    """

    model: str
    target: str
    metric: str
    max_drop: float | None
    within_budget: bool | None
    samples: SampleCounts
    rows: tuple[ModelRow, ...]
    layers: tuple[LayerReport, ...]
    conversions: Mapping[str, int]
    unused_rules: tuple[str, ...] = ()
    remark: str = ""

    def to_jsonable(self) -> dict[str, Any]:
        """Plain lists and dicts."""
        return asdict(self)
