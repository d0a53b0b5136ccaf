"""Convolutions and dense layers compiled for AArch64 and run on the emulated board, against the arithmetic contract.

Protects that ``sdot`` and ``smull`` kernels, which hold activations less 128, ``usmmla`` kernels, whose sums lie two by
two, and ``fmlal`` and ``bfmlal`` kernels, which multiply 16-bit floats as they are, give the bits of the x86 kernels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm

from tests.emulated_board.board import Board, export_for_board, tvm_target
from tests.kernels.anchor_cases import CASES, in_buffers, random_activations, random_case
from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.interface import (
    IntegerElementwiseConstants,
    Interleaving,
    KernelRequest,
    NoConstants,
    Placement,
    Requantization,
)
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import BatchMatmul, Conv2D, Epilogue, Window
from tvm_hquant.stored_outputs import in_channel_order
from tvm_hquant.tensor_format import STORAGE_DTYPE

BOARDS = [
    (("arm_neon",), "cortex-a53"),
    (("arm_dotprod",), "cortex-a76"),
    (("arm_bf16", "arm_fp16fml", "arm_i8mm"), "neoverse-v1"),
]
INSTRUCTIONS = {
    "cortex-a53": ("smlal2", "smlal ", "chain 2", "chain 4", "depthwise_conv2d[smlal 3x16]", "3x16 chain 3", "sweeps"),
    "cortex-a76": ("conv2d[sdot", "depthwise_conv2d[sdot 2x", "sweeps"),
    "neoverse-v1": ("usmmla", "sudot", "depthwise_conv2d[usdot 2x", "fmlal", "bfmlal"),
}
"""What the names of the kernels must tell."""
DEPTHWISE = {
    "depthwise, rows shared": Conv2D((1, 9, 8, 21), 21, Window((3, 3), padding=(1, 1, 1, 1)), groups=21),
    "depthwise, five rows": Conv2D((2, 9, 8, 8), 8, Window((5, 3), (2, 1), (2, 1, 2, 1), (1, 2)), groups=8),
}


def requests() -> list[KernelRequest]:
    """Cases with 8-bit codes, one with 16-bit codes, two points and a fused residual, some as floats."""
    plain = (
        "1x1",
        "1x1 strided",
        "stem, three channels",
        "asymmetric, dilated",
        "grouped",
        "window larger than the map",
        "few outputs",
        "dense, rows",
    )
    # Five pairs of input channels: one is left over when operands are loaded four at a time.
    odd = Conv2D((1, 4, 4, 10), 16, Window((1, 1)))
    operators = [*(CASES[name] for name in plain), *DEPTHWISE.values(), odd]
    found = [KernelRequest(operator, ("uint8",), "uint8", "int8") for operator in operators]
    for operator in (CASES["3x3 padded"], DEPTHWISE["depthwise, rows shared"]):
        with_residual = replace(operator, epilogue=Epilogue(True, True))
        found.append(KernelRequest(with_residual, ("uint16", "uint8"), "uint16", "int8", 2))
        found.append(KernelRequest(with_residual, ("bfloat16", "float32"), "bfloat16", "bfloat16"))
    # Even and odd channels, eight outputs and fewer: with instructions for 16-bit floats, and what is left for others.
    for name in ("3x3 padded", "1x1", "asymmetric, dilated", "grouped", "few outputs", "dense", "dense, rows"):
        for storage in ("float16", "bfloat16"):
            operator = replace(CASES[name], epilogue=Epilogue(True, name == "3x3 padded"))
            inputs = (storage, "float32") if operator.epilogue.has_residual else (storage,)
            found.append(KernelRequest(operator, inputs, "float32", storage))
    # Small maps that are swept, with channels left over when operands are loaded four at a time.
    for storage in ("float16", "bfloat16"):
        small = Conv2D((1, 7, 7, 39), 24, Window((3, 3), padding=(1, 1, 1, 1)), 1, Epilogue(True, lower=0.0))
        found.append(KernelRequest(small, (storage,), storage, storage, finite_weights=True))
    # Channel shuffles, and a sum over its residual.
    for groups, shuffled, storage in (
        (2, 2, "float32"),
        (4, 4, "float32"),
        (4, 4, "uint8"),
        (2, 7, "uint8"),
        (1, 4, "bfloat16"),
    ):
        grouped = Conv2D((1, 4, 5, 24), 28, Window((3, 3), padding=(1, 1, 1, 1)), groups, Epilogue(lower=0.0))
        weights = "int8" if storage == "uint8" else storage
        found.append(KernelRequest(grouped, (storage,), storage, weights, finite_weights=True, shuffled=shuffled))
    for storage, weights in (("uint8", "int8"), ("float32", "float32")):
        residual = Conv2D((1, 5, 5, 12), 64, Window((1, 1)), 1, Epilogue(True, True))
        found.append(KernelRequest(residual, (storage, storage), storage, weights, overwritten=1))
    # Channels out of wider buffers, and outputs in turns with some of another one.
    for storage, weights in (("uint8", "int8"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        for operator in (Conv2D((1, 5, 5, 29), 29, Window((1, 1)), 1, Epilogue(lower=0.0)), CASES["3x3 padded"]):
            sources, other = (Placement(3, 40),), Interleaving(1, Placement(5, 41))
            found.append(
                KernelRequest(
                    operator, (storage,), storage, weights, sources=sources, interleaved=other, finite_weights=True
                )
            )
        depthwise = DEPTHWISE["depthwise, rows shared"]
        found.append(KernelRequest(depthwise, (storage,), storage, weights, sources=(Placement(2, 30),)))
    return found


ENDS = [
    DEPTHWISE["depthwise, rows shared"],
    Conv2D((2, 7, 6, 40), 40, Window((3, 3), (2, 2), (1, 1, 1, 1)), groups=40),
    Conv2D((1, 9, 8, 19), 19, Window((5, 3), (1, 2), (2, 1, 2, 1), (1, 2)), groups=19),
    Conv2D((1, 6, 7, 16), 16, Window((3, 2), (1, 1), (2, 0, 0, 1), (2, 1)), groups=16),
    # One, two and four vectors of four channels that become bytes together, with pixels left over.
    Conv2D((1, 5, 7, 16), 20, Window((3, 3), padding=(1, 1, 1, 1)), 1, Epilogue(True, True)),
    Conv2D((1, 3, 11, 8), 8, Window((1, 1)), 1, Epilogue(True, True)),
    Conv2D((2, 5, 6, 24), 37, Window((1, 2), (1, 1)), 1),
]
"""Layers whose ends are tested: depthwise with windows of all kinds, and others, with residuals and without."""


def codes_with_ends(rng: np.random.Generator) -> list[tuple]:
    """Layers of codes with limits inside the codes; values that fit int16, int32 or neither.

    Activations begin at whichever code is the lowest, and some weights are the largest.
    """
    found = []
    for operator in ENDS:
        for steep in (1.0, 1e3, 1e9):
            limit = 127 if steep == 1 else 63
            storages: tuple = ("uint8",) * (1 + operator.epilogue.has_residual)
            request, constants, inputs = random_case(rng, KernelRequest(operator, storages, "uint8", "int8"), limit)
            zero_point = int(rng.choice([0, 100]))
            end = Requantization(-float(zero_point), 255.0 - zero_point, zero_point)
            if steep > 1 or zero_point:
                end = replace(end, lower=end.lower + 3, upper=end.upper - 11)
            constants = replace(constants, requantization=end, multiplier=constants.multiplier * np.float32(steep))
            inputs[0][:, ::2] = rng.choice([0, 255], inputs[0][:, ::2].shape).astype(np.uint8)
            overwritten = 1 if operator.epilogue.has_residual and steep > 1 and operator.out_channels % 8 == 0 else None
            proven = proven_ending(constants)
            found.append((replace(request, ending=proven, overwritten=overwritten), constants, inputs))
    assert {(r.ending.fits_int16, r.ending.fits_int32) for r, *_ in found} == {
        (True, True),
        (False, True),
        (False, False),
    }
    return found


def narrow_weights() -> list[tuple[KernelRequest, int]]:
    """Layers whose weights let four and eight products meet in int16, with the largest magnitude of a weight."""
    layer = KernelRequest(Conv2D((1, 5, 5, 64), 16, Window((3, 3), padding=(1, 1, 1, 1))), ("uint8",), "uint8", "int8")
    return [(layer, 63), (layer, 31)]


def products(rng: np.random.Generator) -> list[tuple]:
    """Products of two activations, as attention has them: request, constants, inputs. Some codes are the lowest, −128."""
    split, swapped, plain = (0, 2, 1, 3), (0, 2, 3, 1), (0, 1, 2, 3)
    scores = BatchMatmul(((1, 11, 2, 20), (1, 11, 2, 20)), (split, swapped), plain, 0.25)
    mixed = BatchMatmul(((1, 2, 11, 11), (1, 11, 2, 20)), (plain, split), split)
    constants = IntegerElementwiseConstants((9, 128), (np.float32(0.003),), Requantization(-100.0, 155.0, 100))
    found = []
    for operator, storage in (
        (scores, "uint8"),
        (mixed, "uint8"),
        (scores, "float32"),
        (scores, "bfloat16"),
        (mixed, "float16"),
    ):
        inputs = [random_activations(rng, shape, storage) for shape in operator.input_shapes]
        if storage == "uint8":
            inputs[0][:, :3], inputs[1][:, :, :1] = 0, 0
        request = KernelRequest(operator, (storage, storage), storage)
        found.append((request, constants if storage == "uint8" else NoConstants(), inputs))
    return found


@pytest.mark.parametrize(("families", "cpu"), BOARDS)
def test_anchors_on_a_board_match_the_contract(
    emulated_board: Board, tmp_path: Path, families: tuple[str, ...], cpu: str
) -> None:
    """All forms of convolutions on a core without and one with dot products; full-range codes and weights."""
    functions, arguments, expected = {}, {}, {}
    cases = [
        random_case(np.random.default_rng(index), request, limit)
        for index, (request, limit) in enumerate([*((r, 127) for r in requests()), *narrow_weights()])
    ]
    cases += [*products(np.random.default_rng(99)), *codes_with_ends(np.random.default_rng(98))]
    for index, (request, constants, inputs) in enumerate(cases):
        name = f"kernel_{index}"
        kernel = select_kernel(families_for_target(families), request)
        functions[name] = kernel.function.with_attr("global_symbol", name)
        activations = in_buffers(np.random.default_rng(index), request, list(inputs))
        output = np.zeros(request.output_shape, STORAGE_DTYPE[request.output])
        if request.overwritten is not None:
            output = activations.pop(request.overwritten)
        for position, array in enumerate([*activations, *kernel.pack(constants), output]):
            arguments[f"{name}/{position}"] = array
        expected[name] = (kernel, numerics.evaluate(request, constants, inputs))
    names = " ".join(kernel.name for kernel, _ in expected.values())
    for instruction in INSTRUCTIONS[cpu]:
        assert instruction in names
    library = export_for_board(
        tvm.compile(tvm.IRModule(functions), target=tvm_target(cpu), tir_pipeline=CPU_PIPELINE), tmp_path / "kernels.so"
    )
    np.savez(tmp_path / "arguments.npz", **arguments)
    script, outputs = Path(__file__).with_name("run_kernels_on_board.py"), tmp_path / "outputs.npz"
    result = emulated_board.run_python(
        script, library, tmp_path / "arguments.npz", outputs, cpu=cpu, runtime_only=True, path=()
    )
    assert result.returncode == 0, result.stderr
    with np.load(outputs) as loaded:
        for name, (kernel, values) in expected.items():
            np.testing.assert_array_equal(in_channel_order(kernel.request, loaded[name]), values, err_msg=kernel.name)
