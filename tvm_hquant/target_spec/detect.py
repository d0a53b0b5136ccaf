"""Describes the machine this runs on: by its CPU's flags, never by its name, and a measurement of less than a second.

The rates per cycle come from the shipped spec of the best instruction set that the CPU has; cores, clock, vector pipes, caches
and memory bandwidth are this machine's own.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_hquant.cpu_features import cpu_features, cpuinfo_entries
from tvm_hquant.errors import TargetSpecError
from tvm_hquant.kernels.instruction_set import Host, InstructionSet, load_instruction_sets
from tvm_hquant.target_spec.load import load_target_spec, spec_from
from tvm_hquant.target_spec.spec import TargetSpec

if TYPE_CHECKING:
    from tvm_hquant.target_spec.core_probe import Core

_OLDEST = {"x86_64": "x86-64", "aarch64": "generic"}
"""LLVM's name for the oldest CPU of an architecture."""

_BANDWIDTH_BUFFER_BYTES = 64 * 2**20
_BANDWIDTH_SECONDS = 0.3


def detect_host() -> TargetSpec:
    """A spec of this machine, called ``host``. Takes less than a second, writes nothing.

    Raises:
        TargetSpecError: the CPU's features cannot be read (not Linux).
    """
    features = cpu_features()
    machine = _architecture()
    instruction_set, base = best_instruction_set(machine, features)
    content: dict[str, Any] = base.model_dump(mode="json", by_alias=True, exclude_none=True)
    cores = usable_cores()
    core = _measured_core(base)
    content["name"] = "host"
    content["description"] = (
        f"This machine ({machine}, {cores} cores), detected from its CPU's flags. Clock, memory bandwidth and sizes "
        f"are its own; the rates per cycle are those of {base.name}."
    )
    content["target"] = _target(machine, instruction_set.host or Host(None), cores)
    for unit in content["units"]:
        unit["count"] = cores
        unit["clock_ghz"] = round(core.clock_ghz, 1)
        if unit["vector_pipes"] > 1:  # where the shipped spec says that processors differ
            unit["vector_pipes"] = core.vector_pipes
    content["memory"] = {
        "bandwidth_gb_per_s": max(0.1, round(copy_bandwidth_gb_per_s(), 1)),  # a starved process measures nearly 0
        **cache_fields(),
        "ram_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
    }
    return spec_from(content, "the detected spec of this machine")


def best_instruction_set(machine: str, features: Set[str]) -> tuple[InstructionSet, TargetSpec]:
    """The best of those that a CPU of an architecture with ``features`` has and specs are named for, and that spec.

    Raises:
        TargetSpecError: no instruction set is for such a machine.
    """
    for instruction_set in load_instruction_sets():
        host = instruction_set.host
        if host is None or host.spec is None or host.architecture not in (None, machine):
            continue
        if instruction_set.cpu_features <= features:
            spec = load_target_spec(host.spec)
            if not spec.missing_features(features):
                return instruction_set, spec
    raise TargetSpecError(f"no instruction set is for a machine of architecture {machine}; write a spec by hand")


def usable_cores() -> int:
    """Physical cores that this process may use: its affinity, hyperthreads counted once, within a container's quota."""
    allowed = os.sched_getaffinity(0)
    entries = cpuinfo_entries()
    cores: set[tuple[str, str]] = set()
    processor, package = "", ""
    for key, value in entries:
        if key == "processor":
            processor, package = value, ""
        elif key == "physical id":
            package = value
        elif key == "core id" and processor.isdigit() and int(processor) in allowed:
            cores.add((package, value))
    count = len(cores) or len(allowed)  # ARM's list has no core ids, and no hyperthreads
    quota = _container_quota()
    return count if quota is None else max(1, min(count, int(quota)))


def _container_quota(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Processors that control groups (version 2) allow this container; None without a limit."""
    if not cpu_max.is_file():
        return None
    quota, period = cpu_max.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def cache_fields(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """``l1_data_kib``, ``l2_kib``, ``l3_kib`` and ``l1_data_ways`` of the first core, as far as the kernel tells."""
    fields = {"1": "l1_data_kib", "2": "l2_kib", "3": "l3_kib"}
    sizes: dict[str, int] = {}
    for index in sorted(caches.glob("index*")):
        kind, level, size = ((index / name) for name in ("type", "level", "size"))
        if not (kind.is_file() and level.is_file() and size.is_file()) or kind.read_text().strip() == "Instruction":
            continue
        number = re.match(r"(\d+)([KM]?)", size.read_text().strip())
        field = fields.get(level.read_text().strip())
        if number and field:
            sizes[field] = int(number[1]) * (1024 if number[2] == "M" else 1)
        ways = index / "ways_of_associativity"
        if field == "l1_data_kib" and ways.is_file() and (count := int(ways.read_text())) > 0:
            sizes["l1_data_ways"] = count
    return sizes


@cache
def _measured_core(spec: TargetSpec) -> Core:
    """This machine's core with the vectors that a spec's units fill. A process measures once."""
    from tvm_hquant.target_spec.core_probe import measure_core  # here, so that reading specs does not wait for TVM

    return measure_core(spec.tvm_target(), max(unit.channel_alignment for unit in spec.units))


@cache
def copy_bandwidth_gb_per_s() -> float:
    """Bytes read and written per second by NumPy copies of 64 MiB on one core, GB/s: the best of 0.3 s of copies.

    A process measures once, so that it has one description of its host.
    """
    source = np.ones(_BANDWIDTH_BUFFER_BYTES, np.uint8)
    destination = np.zeros_like(source)
    best = float("inf")
    end = time.perf_counter() + _BANDWIDTH_SECONDS
    while (start := time.perf_counter()) < end:
        np.copyto(destination, source)
        best = min(best, time.perf_counter() - start)
    return 2 * _BANDWIDTH_BUFFER_BYTES / best / 1e9


def _architecture() -> str:
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _target(machine: str, host: Host, cores: int) -> dict[str, Any]:
    """A TVM target that names what the flags prove, not the CPU."""
    target: dict[str, Any] = {"kind": "llvm", "num-cores": cores}
    mcpu = host.mcpu or _OLDEST.get(machine)
    if mcpu is not None:
        target |= {"mtriple": f"{machine}-linux-gnu", "mcpu": mcpu}
    elif platform.system() != "Linux":
        raise TargetSpecError(f"detection knows Linux only, this is {platform.system()}; write a spec by hand")
    # Otherwise LLVM's own default fits a machine that nothing is known of.
    if host.mattr:
        target["mattr"] = list(host.mattr)
    return target
