"""Loss, size and time of every layer with weights in every precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from tvm_hquant.calibration.data import open_data
from tvm_hquant.calibration.split import random_samples
from tvm_hquant.cost.predicted import weight_bytes
from tvm_hquant.precision import FLOAT32, parse_precision
from tvm_hquant.sensitivity.measured import SensitivityTable
from tvm_hquant.session import QuantizationSession


@dataclass(frozen=True)
class ProfileEntry:
    """A layer in one precision: loss of the network with it alone so, bytes of its weights, its kernel's median time."""

    precision: str
    loss: float | None
    weight_bytes: float
    microseconds: float | None
    remark: str = ""


@dataclass(frozen=True)
class ProfiledLayer:
    """A layer with weights in all precisions; float32 comes first."""

    name: str
    operator: str
    entries: tuple[ProfileEntry, ...]


def profile_layers(
    session: QuantizationSession, calibration: Any, precisions: Sequence[str], samples: int
) -> tuple[ProfiledLayer, ...]:
    """Profiles all layers with weights.

    Args:
        calibration: as for :func:`tvm_hquant.quantize`; all of it calibrates, the first ``samples`` measure losses.
        precisions: names. What cannot even be simulated for a layer has a remark instead of numbers; what the target
            forbids has numbers and the remark ``not deployable here``.

    Raises:
        DataError, PrecisionError: wrong data, or an unknown precision.
    """
    source = open_data(calibration, session.signature)
    session.calibrate(source)
    wanted = [parse_precision(name) for name in dict.fromkeys(precisions) if name != "float32"]
    impossible = {
        (layer.name, p.name): why
        for layer in session.graph.anchors
        for p in wanted
        if (why := session.impossible(layer, p)) is not None
    }
    pairs = [(layer.name, p.name) for layer in session.graph.anchors for p in wanted]
    possible = [pair for pair in pairs if pair not in impossible]
    losses = SensitivityTable(session, random_samples(source, samples)).measure(possible)
    sample = next(islice(iter(source), 1))
    everything_float = {layer.name: FLOAT32 for layer in session.graph.anchors}
    float_times = session.engine.time_layers(sample.inputs, session.float_program)
    result = []
    for layer in session.graph.anchors:
        size = weight_bytes(layer, FLOAT32)
        entries = [ProfileEntry("float32", 0.0, size, float_times.get(layer.name))]
        for p in wanted:
            if (layer.name, p.name) in impossible:
                entries.append(ProfileEntry(p.name, None, weight_bytes(layer, p), None, impossible[layer.name, p.name]))
                continue
            program = session.program({**everything_float, layer.name: p})
            times = session.engine.time_layers(sample.inputs, program, only=layer.name)
            against = session.spec.reason_against(p.name, layer.operator_kind, layer.name)
            remark = "not deployable here" if against is not None else ""
            loss = losses[layer.name, p.name]
            entries.append(ProfileEntry(p.name, loss, weight_bytes(layer, p), times.get(layer.name), remark))
        result.append(ProfiledLayer(layer.name, layer.operator_kind, tuple(entries)))
    return tuple(result)
