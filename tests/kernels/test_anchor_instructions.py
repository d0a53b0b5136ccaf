"""What LLVM makes of the kernels of each instruction set, read from the assembly.

Protects the speed of the kernels where it cannot be measured: the instruction that a family is named for must be there, and
sums must stay in registers. Cross-compiling needs neither the processor nor an emulator.
"""

from __future__ import annotations

import re

import pytest
import tvm

from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.interface import KernelRequest, ProvenEnding
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import Conv2D, Dense, Window
from tvm_hquant.target_spec import load_target_spec

ARM = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
TARGETS = {
    "avx512_vnni": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "cascadelake"},
    "avx_vnni": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "alderlake"},
    "avx2": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    "arm_bf16": {**ARM, "mcpu": "neoverse-v1"},
    "arm_fp16fml": {**ARM, "mcpu": "neoverse-v1"},
    "arm_i8mm": {**ARM, "mcpu": "neoverse-v1"},
    "arm_dotprod": {**ARM, "mcpu": "cortex-a76"},
    "arm_neon": {**ARM, "mcpu": "cortex-a72"},
}
PLAIN = Conv2D((1, 14, 14, 64), 64, Window((3, 3), padding=(1, 1, 1, 1)))
STRIDED = Conv2D((1, 14, 14, 64), 64, Window((3, 3), (2, 2), (1, 1, 1, 1)))
"""Winograd's algorithm does not compute it."""
DEPTHWISE = Conv2D((1, 14, 14, 64), 64, Window((3, 3), padding=(1, 1, 1, 1)), groups=64)


def assembly(family: str, request: KernelRequest) -> str:
    """What LLVM generates for a request."""
    kernel = select_kernel(families_for_target((family,)), request)
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    return str(
        tvm.compile(module, target=tvm.target.Target(TARGETS[family]), tir_pipeline=CPU_PIPELINE).mod.inspect_source(
            "s"
        )
    )


def innermost_loop(source: str, instruction: str) -> list[str]:
    """The instructions between the label before the first use of ``instruction`` and the jump back to it."""
    lines = [line.strip() for line in source.splitlines()]
    first = next(i for i, line in enumerate(lines) if re.match(rf"{instruction}\b", line))
    start = max(i for i in range(first) if lines[i].startswith(".LBB"))
    label = lines[start].split(":")[0]
    end = next(i for i in range(first, len(lines)) if re.match(rf"(j|b\.|cb).*{re.escape(label)}$", lines[i]))
    return lines[start + 1 : end]


@pytest.mark.parametrize("operator", [STRIDED, DEPTHWISE], ids=["conv2d", "depthwise"])
@pytest.mark.parametrize(
    ("family", "pairs", "instructions"),
    [
        ("avx512_vnni", 0, ["vpdpbusd", "vcvtps2dq"]),
        ("avx_vnni", 0, [r"vpdpbusd\s.*ymm", "vcvtps2dq"]),
        ("avx2", 0, ["vpmaddwd", "vcvtps2dq"]),
        ("avx2", 1, ["vpmaddubsw", "vpmaddwd"]),
        ("arm_dotprod", 0, ["sdot", "fcvtn|frintx|frintn|fcvtns|uzp1"]),
        ("arm_i8mm", 0, ["usmmla|usdot", "fcvtn|frintx|frintn|fcvtns|uzp1"]),
        ("arm_neon", 0, ["smull", "sadalp|saddw"]),
    ],
)
def test_families_use_their_instructions(operator: Conv2D, family: str, pairs: int, instructions: list[str]) -> None:
    """The named instruction, and vector instructions for rounding instead of calls of the C library."""
    source = assembly(family, KernelRequest(operator, ("uint8",), "uint8", "int8", 1, pairs))
    for instruction in instructions:
        assert re.search(rf"\b({instruction})", source), instruction
    assert not re.search(r"\b(call|bl)\w*\s+_?(fma|lrint|rint)", source)


@pytest.mark.parametrize(
    ("family", "instruction"),
    [("avx512_vnni", "vpdpbusd"), ("avx2", "vpmaddwd"), ("arm_i8mm", "usmmla"), ("arm_dotprod", "sdot")],
)
@pytest.mark.parametrize("operator", [PLAIN, STRIDED], ids=["plain", "strided"])
def test_sums_stay_in_registers(operator: Conv2D, family: str, instruction: str) -> None:
    """The inner loop reads activations and weights only: nothing goes to the stack, nothing is stored."""
    loop = innermost_loop(assembly(family, KernelRequest(operator, ("uint8",), "uint8", "int8")), instruction)
    assert sum(line.startswith(instruction) for line in loop) >= 4
    assert not [line for line in loop if re.search(r"%rsp|\[sp|^st[rp]\b", line)]


def test_products_do_not_wait_on_the_stack() -> None:
    """Plain NEON, sixteen channels: a kernel position is one step, and no product waits for those of the next ones."""
    operator = Conv2D((1, 8, 8, 16), 16, Window((3, 3), padding=(1, 1, 1, 1)))
    source = assembly("arm_neon", KernelRequest(operator, ("uint8",), "uint8", "int8"))
    assert source.count("smlal2") > 50
    assert len(re.findall(r"\bst[rp]\s+q\d.*\[sp", source)) < 5


@pytest.mark.parametrize("family", ["arm_neon", "arm_dotprod", "arm_i8mm"])
def test_arm_packs_codes(family: str) -> None:
    """Where constants prove what they mostly do, saturation is all of the clamp, and nothing is compared."""
    proven = ProvenEnding(fits_int32=True, fits_int16=True, starts_at_zero=True, is_whole_range=True)
    source = assembly(family, KernelRequest(STRIDED, ("uint8",), "uint8", "int8", ending=proven))
    assert "sqxtun" in source
    assert not re.search(r"\b(fcmgt|bsl|frint|fcvt)", source)


@pytest.mark.parametrize(("rows", "are_many"), [(1, True), (64, False)])
def test_many_weights_are_widened_as_they_are_loaded(rows: int, are_many: bool) -> None:
    """On plain AVX2, weights of 8 bits that are more than the outputs take a byte each, and one instruction widens a vector."""
    request = KernelRequest(Dense(rows, 64, 128), ("uint8",), "uint8", "int8")
    loop = innermost_loop(assembly("avx2", request), "vpmaddwd")
    widening = [line for line in loop if re.match("vp(movsx|unpck|sra)", line)]
    assert bool(widening) == are_many
    assert all(line.startswith("vpmovsxbw") for line in widening)


def test_object_files_for_macos() -> None:
    """The spec of a Mac gives Mach-O code with its instructions, though nothing here can link it."""
    spec = load_target_spec("apple-m1")
    for storage, weights, instruction in (("uint8", "int8", "sdot"), ("float16", "float16", "fmlal")):
        kernel = select_kernel(
            families_for_target(spec.instruction_sets), KernelRequest(PLAIN, (storage,), storage, weights)
        )
        module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
        source = str(tvm.compile(module, target=spec.tvm_target(), tir_pipeline=CPU_PIPELINE).mod.inspect_source("s"))
        assert "__TEXT,__text" in source
        assert re.search(rf"\b{instruction}", source)


@pytest.mark.parametrize(
    ("family", "storage", "instruction"),
    [("arm_fp16fml", "float16", "fmlal"), ("arm_bf16", "bfloat16", "bfmlal")],
)
def test_sixteen_bit_floats_need_no_widening(family: str, storage: str, instruction: str) -> None:
    """The inner loop multiplies stored values by an element of a register; nothing is converted, repeated or spilled."""
    source = assembly(family, KernelRequest(PLAIN, (storage,), storage, storage))
    loop = innermost_loop(source, rf"{instruction}\w*\s.*\.h\[\d")
    assert sum(line.startswith(instruction) for line in loop) >= 64
    assert not [line for line in loop if re.search(r"\[sp|^st[rp]\b|^(dup|fcvt|shl|ushll|mov)", line)]


@pytest.mark.parametrize("family", sorted({*TARGETS} - {"avx_vnni", "arm_bf16", "arm_fp16fml"}))
def test_floats_are_fused(family: str) -> None:
    """float32 layers are fused multiply-adds, never a product and an addition."""
    source = assembly(family, KernelRequest(PLAIN, ("float32",), "float32", "float32"))
    assert re.search(r"\b(vfmadd\d+ps|fmla)\b", source)
    assert not re.search(r"\b(vmulps|fmul\s+v)", source)


@pytest.mark.parametrize("operator", [PLAIN, DEPTHWISE], ids=["conv2d", "depthwise"])
def test_tiles_need_no_allocator(operator: Conv2D) -> None:
    """Vectors of a tile are on the stack: the workspace allocator is called for copies of activations alone.

    LLVM may load its address twice for one call; there are more than 16 vectors in a tile.
    """
    source = assembly("avx512_vnni", KernelRequest(operator, ("uint8",), "uint8", "int8"))
    assert len(re.findall(r"movq\s+__TVMBackendAllocWorkspace", source)) <= 2
