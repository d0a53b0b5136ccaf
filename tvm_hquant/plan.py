"""The precision plan: what was decided, in a file that a person can read, edit and compare.

``plan.json`` holds the decision for every layer, the scale and zero point of every tensor, and the groups of tensors that
share them. ``plan.npz`` beside it, named with its SHA-256, holds the weight codes, their scales and the biases. The
multipliers, offsets and limits of the kernels are derived from these and stand nowhere.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.atomic_file import write_at_once
from tvm_hquant.errors import HQuantError, PlanError, PrecisionError
from tvm_hquant.formats import TensorScales
from tvm_hquant.layers import Layer, LayerGraph
from tvm_hquant.precision import Arithmetic, Precision, parse_precision
from tvm_hquant.quantized_weights import QuantizedWeights, quantize_layer_weights
from tvm_hquant.rounding.weight_rounding import NEAREST, WeightRounding
from tvm_hquant.tensor_format import TensorFormat

PLAN_VERSION = 1


@dataclass(frozen=True)
class LayerDecision:
    """The precision of one layer and why.

    ``reason`` is one of: within budget, sensitive, no kernel, the spec forbids, cast cost, chosen by the user, and for
    layers without weights also: as its readers, as its makers.
    ``detail`` says it in a sentence.
    ``stored_bits`` are those of the weights in the artifact, where they are fewer than the precision computes with.
    """

    precision: str
    reason: str
    detail: str = ""
    stored_bits: int | None = None

    @property
    def weight_precision(self) -> Precision:
        """The precision whose weight codes the layer has (:meth:`Precision.with_stored_weights`)."""
        return parse_precision(self.precision).with_stored_weights(self.stored_bits)


@dataclass(frozen=True, eq=False)
class PrecisionPlan:
    """A decision for every layer, and the numbers that quantization needs.

    Attributes:
        fingerprint: of the model (:attr:`LayerGraph.fingerprint`) that the plan is for.
        target: name of the target spec that it was made for.
        layers: a decision per layer.
        scales: for each tensor its formats in the kinds of codes that were calibrated.
        groups: names of tensors that share one format.
        weights: codes per layer with weights, for the precision that ``weight_precisions`` names.
        weight_precisions: the precision for which the codes of a layer were made
            (:attr:`LayerDecision.weight_precision`).
    """

    fingerprint: str
    target: str
    layers: Mapping[str, LayerDecision]
    scales: TensorScales
    groups: tuple[tuple[str, ...], ...] = ()
    weights: Mapping[str, QuantizedWeights] = field(default_factory=dict)
    weight_precisions: Mapping[str, str] = field(default_factory=dict)

    def precisions(self) -> dict[str, Precision]:
        """The precision of every layer."""
        return {name: parse_precision(decision.precision) for name, decision in self.layers.items()}

    def layer_weights(
        self, layer: Layer, precision: Precision, rounding: WeightRounding = NEAREST
    ) -> QuantizedWeights | None:
        """Weight codes of a layer: the stored ones, or made now where the plan has none for this precision.

        None where the precision stores no codes.
        """
        codes = precision.with_stored_weights(
            self.layers[layer.name].stored_bits if layer.name in self.layers else None
        )
        if not layer.is_anchor or codes.arithmetic is Arithmetic.FLOAT:
            return None
        if self.weight_precisions.get(layer.name) == codes.name:
            return self.weights[layer.name]
        return quantize_layer_weights(layer, codes, rounding)

    def with_layers(self, layers: Mapping[str, LayerDecision]) -> PrecisionPlan:
        """The plan with some decisions replaced."""
        return replace(self, layers={**self.layers, **layers})

    def completed(self, graph: LayerGraph, rounding: WeightRounding = NEAREST) -> PrecisionPlan:
        """The plan with codes for every layer that needs some, in its present precision, and no others.

        Codes that are made now are made by ``rounding``: see :func:`~tvm_hquant.rounding.weight_rounding.rounding_for`.

        Raises:
            PlanError: the plan is for another model.
        """
        self.check_model(graph)
        precisions = self.precisions()
        weights: dict[str, QuantizedWeights] = {}
        for layer in graph.anchors:
            codes = self.layer_weights(layer, precisions[layer.name], rounding)
            if codes is not None:
                weights[layer.name] = codes
        made_for = {name: self.layers[name].weight_precision.name for name in weights}
        return replace(self, weights=weights, weight_precisions=made_for)

    def check_model(self, graph: LayerGraph) -> None:
        """Makes sure that the plan is for this model.

        Raises:
            PlanError: it is for another model, or a layer has no decision.
        """
        unknown = [name for name in self.layers if name not in graph.by_name]
        missing = [layer.name for layer in graph.layers if layer.name not in self.layers]
        if unknown or missing:
            parts = []
            if unknown:
                parts.append(f"it names layers that the model does not have ({_some(unknown)})")
            if missing:
                parts.append(f"it has no decision for layers of the model ({_some(missing)})")
            if self.fingerprint == graph.fingerprint:
                raise PlanError(f"the plan was edited wrongly: {' and '.join(parts)}{_guess(unknown, missing)}")
            raise PlanError(f"the plan is for another model: {' and '.join(parts)}; make one with 'hquant compile'")
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                "the plan is for another model: the layers have the same names, but shapes or weights differ; "
                "make one for this model with 'hquant compile'"
            )

    def to_json(self, weights_sha256: str | None = None, weights_file: str = "plan.npz") -> str:
        """The text of ``plan.json``; ``weights_file`` names the file beside it that holds the weights."""
        document: dict[str, Any] = {
            "version": PLAN_VERSION,
            "model": self.fingerprint,
            "target": self.target,
            "layers": {name: _decision_entry(decision) for name, decision in self.layers.items()},
            "tensors": {
                name: {codes: _scale_entry(f) for codes, f in formats.items()} for name, formats in self.scales.items()
            },
            "groups": [list(group) for group in self.groups],
            "weights": {"file": weights_file, "sha256": weights_sha256},
        }
        return _one_line_per_entry(document)

    def weights_bytes(self) -> bytes:
        """The content of ``plan.npz``."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        for name, w in self.weights.items():
            arrays[f"{name}/codes"], arrays[f"{name}/scales"], arrays[f"{name}/bias"] = w.codes, w.scales, w.bias
            # It stands here, not in plan.json, so that nobody can make codes of one precision pass for another's.
            arrays[f"{name}/precision"] = np.array(self.weight_precisions[name])
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()

    def save(self, folder: Path) -> None:
        """Writes ``plan.json`` and ``plan.npz`` into a folder that exists."""
        self.save_as(folder / "plan.json")

    def save_as(self, path: Path) -> None:
        """Writes a JSON file and, beside it under the same name, an ``.npz`` with the weights."""
        data, weights = self.weights_bytes(), path.with_suffix(".npz")
        write_at_once(weights, data)
        write_at_once(path, self.to_json(hashlib.sha256(data).hexdigest(), weights.name))


def load_plan(path: Path | str) -> PrecisionPlan:
    """Reads ``plan.json`` and, where it stands beside it, ``plan.npz`` (or the file that it names).

    Raises:
        PlanError: a file cannot be read, a field is missing or wrong, or ``plan.npz`` is not the one that belongs to it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the plan {path}: {getattr(error, 'strerror', None) or error}") from None
    weights_path = path.with_name(_weights_file(text))
    data = weights_path.read_bytes() if weights_path.is_file() else None
    return plan_from_text(text, f"the plan {path}", data)


def _weights_file(text: str) -> str:
    """Name of the file beside the plan that holds its weights; what else is wrong with the text is said later."""
    try:
        return Path(str(json.loads(text)["weights"]["file"])).name or "plan.npz"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "plan.npz"


def plan_from_text(text: str, what: str, weights: bytes | None) -> PrecisionPlan:
    """A plan from the text of ``plan.json`` and its weights, the bytes of ``plan.npz``.

    Raises:
        PlanError: a field is missing or wrong, or the bytes are not the ones that belong to it; ``what`` names the plan.
    """
    try:
        return _from_document(json.loads(text), weights)
    except json.JSONDecodeError as error:
        raise PlanError(f"{what} is not JSON: {error}") from None
    except HQuantError as error:
        raise PlanError(f"{what}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        wrong = f"the field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise PlanError(f"{what} has the wrong form: {wrong}; see docs/plan.md") from None


def _from_document(document: Any, stored: bytes | None) -> PrecisionPlan:
    if not isinstance(document, dict):
        raise PlanError("expected an object with version, model, target, layers and tensors")
    if document["version"] != PLAN_VERSION:
        raise PlanError(f"version {document['version']!r} is not supported, only {PLAN_VERSION}; make the plan again")
    layers = {name: _decision(name, entry) for name, entry in document["layers"].items()}
    scales = {
        name: {codes: _scale_format(name, codes, entry) for codes, entry in formats.items()}
        for name, formats in document["tensors"].items()
    }
    groups = tuple(tuple(group) for group in document.get("groups", []))
    _check_groups(groups, scales)
    weights_entry = document.get("weights", {})
    weights: dict[str, QuantizedWeights] = {}
    precisions: dict[str, str] = {}
    if stored is not None:
        if weights_entry.get("sha256") not in (None, hashlib.sha256(stored).hexdigest()):
            raise PlanError("plan.npz beside it is not the file that belongs to it (its SHA-256 differs)")
        weights, precisions = _weights_from_bytes(stored)
    return PrecisionPlan(document["model"], document["target"], layers, scales, groups, weights, precisions)


def _decision(layer: str, entry: Any) -> LayerDecision:
    if not isinstance(entry, dict) or "precision" not in entry:
        raise PlanError(f"layer {layer}: the field 'precision' is missing; see docs/plan.md")
    try:
        precision = parse_precision(str(entry["precision"]))
    except PrecisionError as error:
        raise PlanError(f"layer {layer}: {error}") from None
    stored_bits = entry.get("stored_bits")
    if stored_bits is not None and (not isinstance(stored_bits, int) or isinstance(stored_bits, bool)):
        raise PlanError(f"layer {layer}: stored_bits {stored_bits!r} is not an integer; leave it out, or write 2 to 8")
    if stored_bits is None and precision.computed != precision:
        precision, stored_bits = precision.computed, precision.weight_bits
    try:
        precision.with_stored_weights(stored_bits)
    except PrecisionError as error:
        raise PlanError(f"layer {layer}: {error}") from None
    return LayerDecision(precision.name, str(entry.get("reason", "")), str(entry.get("detail", "")), stored_bits)


def _decision_entry(decision: LayerDecision) -> dict[str, Any]:
    entry: dict[str, Any] = {"precision": decision.precision}
    if decision.stored_bits is not None:
        entry["stored_bits"] = decision.stored_bits
    return {**entry, "reason": decision.reason, "detail": decision.detail}


def _check_groups(groups: tuple[tuple[str, ...], ...], scales: TensorScales) -> None:
    for group in groups:
        formats = [scales[name] for name in group if name in scales]
        if any(f != formats[0] for f in formats):
            raise PlanError(f"the tensors of the group {_some(list(group))} must have one scale and zero point")


def _scale_entry(f: TensorFormat) -> dict[str, Any]:
    return {"scale": float(str(np.float32(f.scale))), "zero_point": f.zero_point}


def _scale_format(tensor: str, codes: str, entry: Mapping[str, Any]) -> TensorFormat:
    scale, zero_point = float(np.float32(entry["scale"])), entry["zero_point"]
    if not isinstance(zero_point, int):
        raise PlanError(f"tensor {tensor}: zero_point {zero_point!r} is not an integer")
    try:
        if codes == "int8":
            return TensorFormat("int8", scale, zero_point, -128, 127)
        bits = int(codes.removeprefix("uint"))
        return TensorFormat("uint8" if bits <= 8 else "uint16", scale, zero_point, 0, 2**bits - 1)
    except ValueError as error:
        raise PlanError(f"tensor {tensor}, {codes}: {error}") from None


def _one_line_per_entry(document: Mapping[str, Any]) -> str:
    """JSON with one line per layer and per tensor, so that two plans can be compared line by line."""
    parts = []
    for key, value in document.items():
        if isinstance(value, dict) and key in ("layers", "tensors"):
            entries = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f"  {json.dumps(key)}: {{\n{entries}\n  }}")
        elif key == "groups":
            entries = ",\n".join(f"    {json.dumps(v)}" for v in value)
            parts.append(f"  {json.dumps(key)}: [\n{entries}\n  ]" if value else f"  {json.dumps(key)}: []")
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _weights_from_bytes(data: bytes) -> tuple[dict[str, QuantizedWeights], dict[str, str]]:
    """Codes, and the precisions that they were made for, by layer."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            names = sorted({key.rpartition("/")[0] for key in archive.files})
            weights = {
                name: QuantizedWeights(archive[f"{name}/codes"], archive[f"{name}/scales"], archive[f"{name}/bias"])
                for name in names
            }
            return weights, {name: str(archive[f"{name}/precision"]) for name in names}
    except (OSError, EOFError, KeyError, TypeError, AttributeError, ValueError, zipfile.BadZipFile) as error:
        raise PlanError(f"plan.npz beside it is damaged ({error}); make the plan again") from None


def _guess(unknown: list[str], missing: list[str]) -> str:
    close = difflib.get_close_matches(unknown[0], missing, n=1) if unknown else []
    return f"; write {close[0]} for {unknown[0]}" if close else "; 'hquant inspect' lists the layers"


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
