"""CUDA without a GPU: protects that kernels keep to the contract, and that libraries hold machine code or nothing is made."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.planned_models import named_plan, partitioned
from tvm_hquant.artifact import check_linker, compile_artifact
from tvm_hquant.compilation import build_module, lower
from tvm_hquant.cuda_compilation import compile_kernels, find_nvcc, kernel_source, replace_source, source_kept
from tvm_hquant.errors import ArtifactError, ToolchainError
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.runtime import load_artifact
from tvm_hquant.target_spec import load_target_spec

TARGETS = {"jetson-orin": "sm_87", "cuda-sm90": "sm_90"}
FATBIN = struct.pack("<I", 0xBA55ED50)
"""How a fatbin begins (``fatbinary_section.h`` of the CUDA toolkit); 44 bytes later stands the architecture's number."""


@cache
def source(target: str, model: str, plan: str) -> str:
    """The CUDA source of all kernels of a small model under a plan."""
    spec = load_target_spec(target)
    lowered = lower(partitioned(model), named_plan(model, plan), spec, families_for_target(spec.instruction_sets))
    with source_kept():
        return kernel_source(build_module(lowered, spec.tvm_target(), spec.name).mod)


@pytest.fixture
def nvcc() -> Path:
    try:
        return find_nvcc()
    except ToolchainError as reason:
        pytest.skip(str(reason))


def without_indices(code: str) -> str:
    """C code whose subscripts are empty."""
    before = ""
    while before != code:
        before, code = code, re.sub(r"\[[^\[\]]+\]", "[]", code)
    return code


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("model", "plan"), [("residual", "float32"), ("residual", "a8w8"), ("branches", "mixed")])
def test_no_product_is_left_to_the_compiler(target: str, model: str, plan: str) -> None:
    """nvcc fuses products and sums as it likes: every float product has to be an intrinsic that is rounded as it says."""
    code = source(target, model, plan)
    kernels = code[code.index('extern "C" __global__') :]
    assert "__fmaf_rn(" in kernels
    for kernel in kernels.split('extern "C" __global__')[1:]:
        integers = "|".join(re.findall(r"\bint (\w+)\[", kernel)) or "none"
        lines = [line for line in without_indices(kernel).splitlines()[1:] if not re.search(r"\bint \w+ =", line)]
        factors = [factor for line in lines for factor in re.findall(r" \* (\S+)", line)]
        # What may remain: products of integers, and those with a power of two, which are exact.
        exact = rf"\(\(int\)|({integers})\[\]|-?\d+\W*$|-?0x1p[+-]\d+f"
        assert not [f for f in factors if not re.match(exact, f)]
    assert ("__dp4a(" in kernels) == (plan != "float32")


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_87", "sm_90"])
def test_integer_layers_are_dot_products(nvcc: Path, tmp_path: Path, architecture: str) -> None:
    """nvcc makes one instruction of each ``__dp4a``, for every GPU that a spec names."""
    code, output = tmp_path / "kernels.cu", tmp_path / "kernels.ptx"
    code.write_text(source("cuda-sm90", "residual", "a8w8"), encoding="utf-8")
    command = [nvcc, "--ptx", "-O3", f"-arch={architecture}", "-o", output, code]
    subprocess.run(command, check=True, capture_output=True)
    assert "dp4a.s32.s32" in output.read_text(encoding="utf-8")


@pytest.mark.parametrize("plan", ["float32", "mixed"])
def test_nvcc_finds_nothing_to_contract(nvcc: Path, tmp_path: Path, plan: str) -> None:
    """The proof of the compiler itself: its PTX is the same whether it may contract or not."""
    code = tmp_path / "kernels.cu"
    code.write_text(source("cuda-sm90", "residual", plan), encoding="utf-8")
    listings = []
    for contract in ("true", "false"):
        output = tmp_path / f"{contract}.ptx"
        options = ["--ptx", "-O3", "-arch=sm_90", f"--fmad={contract}"]
        subprocess.run([nvcc, *options, "-o", output, code], check=True, capture_output=True)
        listings.append(re.sub(r"//.*", "", output.read_text(encoding="utf-8")))
    # A later stage may still contract where no rounding is written: products with powers of two, as no sum lacks it.
    assert listings[0].replace("mul.f32", "mul.rn.f32") == listings[1]
    assert "fma.rn.f32" in listings[0]
    assert not re.search(r"\b(add|sub|div)\.f32|\.ftz|\.approx", listings[0])


@pytest.mark.parametrize(("target", "architecture"), TARGETS.items())
def test_libraries_hold_machine_code(nvcc: Path, target: str, architecture: str) -> None:
    """Without a driver, TVM leaves the source to a compiler on the board, where fast math is on."""
    spec = load_target_spec(target)
    check_linker(spec)
    artifact = compile_artifact(partitioned("residual"), named_plan("residual", "mixed"), spec)
    library = (artifact.folder / artifact.manifest["library"]).read_bytes()
    start = library.index(FATBIN)
    assert library.index(struct.pack("<Q", 6) + b"fatbin") < start
    assert b"__global__" not in library
    assert artifact.manifest["target"]["device"] == "cuda"
    machine = {"jetson-orin": 183, "cuda-sm90": 62}[target]
    assert struct.unpack_from("<H", library, 18)[0] == machine, "the host part is for another processor (ELF e_machine)"
    assert struct.unpack_from("<I", library, start + 44)[0] == int(architecture.removeprefix("sm_"))


def test_refused_source_is_explained(nvcc: Path) -> None:
    """One line of the compiler's message, and the architecture."""
    with pytest.raises(ToolchainError, match=r"cannot compile the kernels for sm_90: .*error"):
        compile_kernels("this is no program", "sm_90")
    with pytest.raises(ToolchainError, match="cannot compile the kernels for sm_10"):
        compile_kernels("", "sm_10")


def test_missing_nvcc_is_found_out_before_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A search may take long: that nothing can be compiled after it has to be said first, with what to install."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ToolchainError, match=r"nvcc, which this machine does not have: .*pip install nvidia-cuda-nvcc"):
        check_linker(load_target_spec("jetson-orin"))


def test_nvcc_of_cuda_home_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CUDA's own variable chooses between several toolkits."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_nvcc() == tmp_path / "bin" / "nvcc"


def test_machine_without_a_gpu_says_so(nvcc: Path, tmp_path: Path) -> None:
    """TVM's own message names a function that is not registered."""
    import tvm

    if tvm.cuda().exist:
        pytest.skip("this machine has a GPU")
    artifact = compile_artifact(partitioned("residual"), named_plan("residual", "a8w8"), load_target_spec("cuda-sm90"))
    if os.uname().machine != "x86_64":
        pytest.skip("the artifact's host part is for x86-64")
    with pytest.raises(ArtifactError, match="cuda-sm90 needs an NVIDIA GPU, and TVM finds none"):
        load_artifact(artifact.save(tmp_path / "artifact").folder)


def test_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is set for one build must not change the user's next one."""
    monkeypatch.delenv("TVM_COMPILE_FORCE_FALLBACK", raising=False)
    with pytest.raises(KeyError), source_kept():  # noqa: PT012 - what is raised inside must not keep it set
        assert os.environ["TVM_COMPILE_FORCE_FALLBACK"] == "1"
        raise KeyError
    assert "TVM_COMPILE_FORCE_FALLBACK" not in os.environ
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "0")
    with source_kept():
        pass
    assert os.environ["TVM_COMPILE_FORCE_FALLBACK"] == "0"


def string(content: bytes) -> bytes:
    """As TVM writes it: the length, then the bytes."""
    return struct.pack("<Q", len(content)) + content


def packed(modules: list[tuple[bytes, bytes]]) -> bytes:
    """Serialized modules, each imported by the one before it."""
    rows = [*range(len(modules)), len(modules) - 1]
    tree = struct.pack(f"<{len(rows) + 1}Q", len(rows), *rows)
    tree += struct.pack(f"<{len(modules)}Q", len(modules) - 1, *range(1, len(modules)))
    return string(tree + b"".join(string(k) + (b"" if k == b"_lib" else string(c)) for k, c in modules))


OTHERS = st.lists(st.tuples(st.sampled_from([b"relax.VMExecutable", b"_lib", b"const_loader"]), st.binary(max_size=40)))
CUDA = st.tuples(st.binary(max_size=30), st.binary(max_size=60), st.binary(max_size=200))


@settings(max_examples=60, deadline=None)
@given(before=OTHERS, after=OTHERS, cuda=CUDA)
def test_only_the_source_is_replaced(
    before: list[tuple[bytes, bytes]], after: list[tuple[bytes, bytes]], cuda: tuple[bytes, bytes, bytes]
) -> None:
    """Whatever stands around it, and whatever lengths and bytes occur: all else stays as it was."""
    functions, code, machine_code = cuda
    old = (b"cuda", string(b"cuda") + functions + string(code))
    new = (b"cuda", string(b"fatbin") + functions + string(machine_code))
    assert replace_source(packed([*before, old, *after]), code, machine_code) == packed([*before, new, *after])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_another_layout_is_refused(data: st.DataObject) -> None:
    """A library with half-replaced modules would end the board's process when it is loaded."""
    whole = packed(
        [(b"relax.VMExecutable", b"12345"), (b"_lib", b""), (b"cuda", string(b"cuda") + b"ff" + string(b"x"))]
    )
    length = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:length], string(whole[8 : 8 + length])):
        with pytest.raises(ToolchainError, match="packs modules in another way"):
            replace_source(damaged if damaged != whole else b"", b"x", b"machine code")
    with pytest.raises(ToolchainError, match="no CUDA source"):
        replace_source(whole, b"another source", b"machine code")
