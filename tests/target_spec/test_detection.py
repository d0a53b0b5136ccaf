"""Detection of this machine from its CPU's flags."""

from __future__ import annotations

import os
from collections.abc import Set
from pathlib import Path

import pytest

from tests.target_spec.spec_content import on_linux
from tvm_hquant.errors import TargetSpecError
from tvm_hquant.target_spec import cpu_features, detect_host, load_target_spec
from tvm_hquant.target_spec.detect import best_instruction_set, cache_fields


def test_features_of_unlike_cores(tmp_path: Path) -> None:
    """Protects big.LITTLE machines: only what all cores have may be compiled in."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n\nprocessor\t: 1\nFeatures\t: fp asimd\n")
    assert cpu_features(cpuinfo) == {"fp", "asimd"}
    cpuinfo.write_text("processor\t: 0\nisa\t: rv64imafdc\n")
    assert cpu_features(cpuinfo) == frozenset()
    with pytest.raises(TargetSpecError, match="read on Linux only"):
        cpu_features(tmp_path / "missing")


def test_base_follows_flags() -> None:
    """Protects the choice of kernels: by what the flags say, the best set whose whole level is there."""

    def base_spec(machine: str, features: Set[str]) -> str:
        return best_instruction_set(machine, features)[1].name

    v3 = {"avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"}
    v4 = v3 | {"avx512f", "avx512bw", "avx512vl", "avx512cd", "avx512dq"}
    assert base_spec("x86_64", v3) == "x86-64-avx2"
    assert base_spec("x86_64", v4) == "x86-64-avx2"
    assert base_spec("x86_64", v4 | {"avx512_vnni"}) == "x86-64-avx512-vnni"
    assert base_spec("x86_64", v4 | {"avx512_vnni", "avx512_bf16"}) == "x86-64-avx512-bf16"
    assert base_spec("x86_64", v3 | {"avx_vnni"}) == "x86-64-avx-vnni"
    assert base_spec("x86_64", {"sse4_2"}) == "portable-cpu"
    assert base_spec("aarch64", {"asimd"}) == "cortex-a72"
    assert base_spec("aarch64", {"asimd", "asimddp"}) == "cortex-a76"
    assert base_spec("riscv64", frozenset()) == "portable-cpu"


def test_cache_sizes(tmp_path: Path) -> None:
    """Protects the reading of Linux's cache files: no instruction caches, megabytes understood, gaps allowed."""
    entries = (("1", "Data", "48K"), ("1", "Instruction", "64K"), ("2", "Unified", "2M"))
    for index, (level, kind, size) in enumerate(entries):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert cache_fields(tmp_path) == {"l1_data_kib": 48, "l2_kib": 2048}
    (tmp_path / "index0" / "ways_of_associativity").write_text("12\n")
    assert cache_fields(tmp_path) == {"l1_data_kib": 48, "l1_data_ways": 12, "l2_kib": 2048}
    assert cache_fields(tmp_path / "none") == {}


@on_linux
def test_this_machine() -> None:
    """Protects detection: this CPU's flags decide, the result runs here and has the same hash each time."""
    host = detect_host()
    flags = set(Path("/proc/cpuinfo").read_text().split())
    vnni = flags >= {"avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
    expected = {
        "avx512_bf16": vnni and "avx512_bf16" in flags,
        "avx512_vnni": vnni,
        "avx_vnni": "avx_vnni" in flags and not vnni,
        "avx2": flags >= {"avx2", "fma", "f16c", "bmi2"},
        "arm_dotprod": "asimddp" in flags,
        "arm_neon": "asimd" in flags,
        "portable": True,
    }
    assert {name for name, has in expected.items() if has} == set(host.instruction_sets) - {"reference"}
    assert host.name == "host"
    assert host.is_host_compatible()
    assert 1 <= host.units[0].count <= len(os.sched_getaffinity(0))
    assert 0.2 < host.memory.bandwidth_gb_per_s < 5000
    assert load_target_spec("host").spec_hash() == host.spec_hash()
