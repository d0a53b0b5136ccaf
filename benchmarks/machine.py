"""What a figure was measured on: the processor, its caches, the operating system and versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tvm_hquant.cpu_features import cpu_features
from tvm_hquant.kernels.registry import host_instruction_sets


def describe_machine() -> dict[str, Any]:
    """A description for JSON files. Caches are those of the first core, in KiB."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "features": sorted(cpu_features()),
        "instruction_sets": list(host_instruction_sets()),
        "caches_kib": _caches(),
        "system": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("tvm-hquant", "apache-tvm", "numpy", "onnx")},
        },
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    fields = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    named = " ".join(f"{k} {fields[k].strip()}" for k in ("cpu family", "model") if k in fields)
    return f"{fields.get('model name', platform.processor()).strip()} ({named})"


def _caches() -> dict[str, int]:
    sizes = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((cache / name).read_text().strip() for name in ("level", "type"))
        if kind != "Instruction":
            sizes[f"L{level}"] = int((cache / "size").read_text().strip().removesuffix("K"))
    return sizes
