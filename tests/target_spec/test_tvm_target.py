"""From a spec's target table to TVM, and whether this machine can run it."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

import pytest
import tvm

from tests.target_spec.spec_content import on_linux, spec, target
from tvm_hquant.errors import TargetSpecError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            target(mcpu="cortex-a76x", mtriple="aarch64-linux-gnu"),
            r"target\.mcpu: LLVM knows no CPU .*cortex-a76 or",
        ),
        (target(mcpu="cortex-a76", mtriple="x86_64-linux-gnu"), r"target\.mcpu: .* for x86_64-linux-gnu"),
        (target(mtriple="arch64-linux-gnu"), r"target\.mtriple: 'arch64-linux-gnu' .*did you mean aarch64"),
        (
            target(mtriple="aarch64-linux-gnu", mattr=["+neon", "+dotproduct"]),
            r"target\.mattr: LLVM knows no feature 'dotproduct'",
        ),
        ({"target": {"tag": "raspberry-pi/4b"}}, r"target\.tag: TVM knows no target .*raspberry-pi/4b-aarch64"),
        (
            {"target": {"kind": "cuda", "arch": "sm_87", "host": {"kind": "llvm", "mcpu": "x"}}},
            r"target\.host\.mcpu: LLVM knows no CPU 'x'",
        ),
        ({"target": {"kind": "cuda", "arch": "sm_87"}}, r"instruction_sets: arm_neon, portable does not fit"),
        (
            {"target": {"kind": "cuda", "arch": "sm_75"}, "instruction_sets": ["cuda_mma", "cuda"]},
            r"the kernels of cuda_mma need a GPU of sm_80 or later, the target is sm_75",
        ),
        (
            {"target": {"kind": "cuda", "arch": "sm_80"}, "instruction_sets": ["cuda_mma_float", "cuda"]},
            r"the kernels of cuda_mma_float are within a bound, .* bit_exact = false in the unit",
        ),
        ({"instruction_sets": ["cuda"]}, r"instruction_sets: cuda does not fit a target of kind llvm"),
        ({"instruction_sets": ["arm_dotprod"]}, r"instruction_sets: the kernels of arm_dotprod need asimddp"),
        ({"instruction_sets": ["avx2"]}, r"instruction_sets: the kernels of avx2 need avx2, fma"),
    ],
)
def test_names_that_llvm_would_ignore(changes: dict[str, Any], message: str) -> None:
    """Protects against TVM's silence: LLVM ignores unknown CPUs and features and crashes on triples."""
    with pytest.raises(TargetSpecError, match=message):
        spec(**changes).tvm_target()


def test_options_reach_tvm() -> None:
    """Protects that every option of the table is TVM's own option; a tag's options can be overridden."""
    built = spec(target={"tag": "raspberry-pi/4b-aarch64", "num-cores": 2}).tvm_target()
    assert built.attrs["mcpu"] == "cortex-a72"
    assert int(built.attrs["num-cores"]) == 2


def test_other_machines_are_not_this_one() -> None:
    """Protects against running foreign code: another architecture, system or feature is named as the problem."""
    other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
    families = ["portable"]
    foreign = spec(target={"kind": "llvm", "mtriple": f"{other}-linux-gnu"}, instruction_sets=families)
    assert not foreign.is_host_compatible()
    assert f"compiled for {other}" in foreign.host_problems()[0]
    windows = spec(target={"kind": "llvm", "mtriple": "x86_64-pc-windows-msvc"}, instruction_sets=families)
    assert not windows.is_host_compatible()
    local = {"target": {"kind": "llvm"}, "instruction_sets": families}
    assert spec(**local).is_host_compatible()


@on_linux
def test_lacking_feature() -> None:
    """Protects against illegal instructions: a feature that the CPU lacks is named."""
    lacking = spec(target={"kind": "llvm"}, instruction_sets=["portable"], required_cpu_features=["no_such_feature"])
    assert lacking.host_problems() == ("this CPU lacks no_such_feature",)


@pytest.mark.parametrize(
    ("exists", "version", "problem"),
    [
        (False, "", "finds no CUDA device"),
        (True, "7.5", "compiled for sm_87, this machine's GPU is sm_75"),
        (True, "8.6", "compiled for sm_87, this machine's GPU is sm_86"),
        (True, "9.0", "compiled for sm_87, this machine's GPU is sm_90"),
        (True, "8.7", ""),
        (True, "8.9", ""),
    ],
)
def test_gpus(monkeypatch: pytest.MonkeyPatch, exists: bool, version: str, problem: str) -> None:
    """Protects against a GPU that cannot run the code: binaries run on later GPUs of one major version only."""
    device = SimpleNamespace(exist=exists, compute_version=version)
    monkeypatch.setattr(tvm, "cuda", lambda _index: device)
    gpu = spec(target={"kind": "cuda", "arch": "sm_87"}, instruction_sets=["cuda"])
    assert gpu.is_host_compatible() == (problem == "")
    assert problem in "".join(gpu.host_problems())
