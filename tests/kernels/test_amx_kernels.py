"""AMX kernels without AMX: the real loops with tile registers that a C library emulates, against the arithmetic contract.

Protects that tiles, strides, tails, padding, planes and points give the contract's bits, and that LLVM makes the instructions.
What only such a processor can show (permission, speed) is not shown.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.kernels.anchor_cases import CASES, random_case
from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.instruction_sets import amx
from tvm_hquant.kernels.instruction_sets.amx import amx_kernel
from tvm_hquant.kernels.interface import KernelRequest, Placement
from tvm_hquant.kernels.registry import families_for_target, host_instruction_sets, select_kernel
from tvm_hquant.operators import Conv2D, Dense, Epilogue, Window
from tvm_hquant.stored_outputs import in_channel_order
from tvm_hquant.target_spec import load_target_spec
from tvm_hquant.tensor_format import STORAGE_DTYPE

PADDED = Conv2D((1, 9, 21, 40), 72, Window((3, 3), padding=(1, 1, 1, 1)), 1, Epilogue(has_bias=True))
LAYERS = {
    "3x3": PADDED,
    "1x1": Conv2D((2, 5, 5, 128), 32, Window((1, 1))),
    "strided, asymmetric": Conv2D((1, 11, 19, 24), 19, Window((3, 2), (1, 2), (2, 0, 1, 3))),
    "narrow rows": Conv2D((1, 7, 7, 64), 48, Window((3, 3), padding=(1, 1, 1, 1))),
    "seven columns": Conv2D((1, 13, 40, 5), 16, Window((7, 7), (2, 2), (3, 3, 3, 3))),
    "dense, rows": Dense(37, 70, 33),
}


def requests() -> list[KernelRequest]:
    """Layers from and to codes; two points and planes, a residual, other outputs, a place in a wider buffer."""
    found = [KernelRequest(operator, ("uint8",), "uint8", "int8") for operator in LAYERS.values()]
    found.append(replace(found[0], placement=Placement(5, 90)))
    with_residual = replace(PADDED, epilogue=Epilogue(True, True))
    found.append(KernelRequest(with_residual, ("uint8", "uint8"), "uint16", "int8", 2))
    found.append(KernelRequest(with_residual, ("uint16", "uint16"), "float32", "int8", 2))
    return found


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_kernels_match_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request, with full-range codes and weights; the shapes of all tiles fit each other."""
    monkeypatch.setattr(amx, "INSTRUCTIONS", "emulated_")
    monkeypatch.setattr(amx, "ASK_PERMISSION", "add i64 0, 0")
    cases = {f"layer_{i}": random_case(np.random.default_rng(i), request) for i, request in enumerate(requests())}
    kernels = {name: amx_kernel(request) for name, (request, _, _) in cases.items()}
    functions = {name: kernel.function.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    mcpu = "x86-64-v4" if "avx512_vnni" in host_instruction_sets() else "x86-64-v2"
    built = tvm.compile(
        tvm.IRModule(functions), target=tvm.target.Target({"kind": "llvm", "mcpu": mcpu}), tir_pipeline=CPU_PIPELINE
    )
    tiles = tmp_path / "tiles.o"
    source = Path(__file__).with_name("emulated_tiles.c")
    subprocess.run(["gcc", "-O2", "-fPIC", "-c", source, "-o", tiles], check=True)
    built.export_library(str(tmp_path / "layers.so"), options=[str(tiles)])
    library = tvm.runtime.load_module(str(tmp_path / "layers.so"))
    for name, (request, constants, inputs) in cases.items():
        output = tvm.runtime.tensor(np.full(request.output_shape, 77, STORAGE_DTYPE[request.output]))
        arguments = [np.ascontiguousarray(a) for a in (*inputs, *kernels[name].pack(constants))]
        library[name](*map(tvm.runtime.tensor, arguments), output)
        expected = numerics.evaluate(replace(request, placement=None), constants, inputs)
        message = f"{kernels[name].name} {request}"
        np.testing.assert_array_equal(in_channel_order(request, output.numpy()), expected, err_msg=message)


def test_instructions() -> None:
    """LLVM for Sapphire Rapids: a step loads two tiles of activations and two of weights and multiplies all with all."""
    kernel = amx_kernel(KernelRequest(Conv2D((1, 14, 14, 256), 64, Window((1, 1))), ("uint8",), "uint8", "int8"))
    assert kernel is not None
    module = tvm.IRModule({"layer": kernel.function.with_attr("global_symbol", "layer")})
    target = load_target_spec("x86-64-amx").tvm_target()
    source = str(tvm.compile(module, target=target, tir_pipeline=CPU_PIPELINE).mod.inspect_source("s"))
    counts = {
        name: source.count(f"\t{name}\t") for name in ("tileloadd", "tdpbusd", "tilestored", "ldtilecfg", "tilezero")
    }
    # LLVM may unroll the loop over steps.
    assert counts["tileloadd"] == counts["tdpbusd"] >= 4
    assert (counts["tilestored"], counts["tilezero"], counts["ldtilecfg"]) == (4, 4, 1)
    assert "\tsyscall" in source


def test_what_tiles_do_not_serve() -> None:
    """Groups, depthwise layers, few pixels, floats, and a residual beside a place in a wider buffer are the next family's."""
    families = families_for_target(load_target_spec("x86-64-amx").instruction_sets)
    for name in ("grouped", "depthwise", "dense", "asymmetric, dilated"):
        request = KernelRequest(CASES[name], ("uint8",), "uint8", "int8")
        assert amx_kernel(request) is None
        assert not select_kernel(families, request).name.startswith("amx.")
    assert amx_kernel(KernelRequest(PADDED, ("bfloat16",), "bfloat16", "bfloat16")) is None
    with_residual = replace(PADDED, epilogue=Epilogue(True, True))
    placed = KernelRequest(with_residual, ("uint8", "uint8"), "uint8", "int8", placement=Placement(5, 90))
    assert amx_kernel(placed) is None


def test_detection_never_picks_it() -> None:
    """Kernels that have not run on their processor are for those who name them."""
    assert "amx" not in host_instruction_sets()
