"""Target specs: what a piece of hardware computes, what it costs, and what it forbids (``docs/target-spec.md``)."""

from __future__ import annotations

from tvm_hquant.cpu_features import cpu_features, normalize_feature
from tvm_hquant.target_spec.detect import detect_host
from tvm_hquant.target_spec.load import list_target_specs, load_target_spec, read_target_spec
from tvm_hquant.target_spec.schema import Conversion, Forbidden, Memory, Rules, Target, TargetConfiguration, Unit
from tvm_hquant.target_spec.spec import TargetSpec
from tvm_hquant.target_spec.vocabulary import (
    OPERATOR_KINDS,
    OPERATORS_WITH_WEIGHTS,
    STORED_FORMATS,
)

__all__ = [
    "OPERATORS_WITH_WEIGHTS",
    "OPERATOR_KINDS",
    "STORED_FORMATS",
    "Conversion",
    "Forbidden",
    "Memory",
    "Rules",
    "Target",
    "TargetConfiguration",
    "TargetSpec",
    "Unit",
    "cpu_features",
    "detect_host",
    "list_target_specs",
    "load_target_spec",
    "normalize_feature",
    "read_target_spec",
]
