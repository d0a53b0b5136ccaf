"""A small spec as plain data, with fields replaced: what tests of specs start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tvm_hquant.target_spec import TargetSpec
from tvm_hquant.target_spec.load import spec_from

on_linux = pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file(), reason="reads the CPU's flags, which only Linux lists"
)


def content(**changes: Any) -> dict[str, Any]:
    """A small valid spec as plain data, with top-level fields replaced."""
    return {
        "schema_version": 1,
        "name": "board",
        "description": "a board",
        "target": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53", "mattr": ["+neon"]},
        "instruction_sets": ["arm_neon", "portable"],
        "units": [
            unit("integers", ["*conv2d", "dense", "add"], {"a8w8": 8, "int8": 8, "a8w4": 10, "a16w8": 4}),
            unit("floats", ["*"], {"float32": 4, "w8": 4}),
        ],
        "conversions": [{"from": "*", "to": "*", "elements_per_cycle": 2}],
        "memory": {"bandwidth_gb_per_s": 3.5},
    } | changes


def unit(name: str, operators: list[str], rates: dict[str, float], **fields: Any) -> dict[str, Any]:
    return {"name": name, "operators": operators, "clock_ghz": 1.2, "macs_per_cycle": rates, **fields}


def spec(**changes: Any) -> TargetSpec:
    return spec_from(content(**changes), "board.toml")


def target(**changes: Any) -> dict[str, Any]:
    return {"target": {"kind": "llvm", **changes}, "instruction_sets": ["portable"]}
