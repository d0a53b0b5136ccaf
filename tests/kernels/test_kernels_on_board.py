"""Kernels without weights, compiled for AArch64 and run on the emulated board, against the arithmetic contract.

Protects that other vectors, another rounding instruction and another fused multiply-add give the same bits.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tvm
from kernel_cases import CODES, COMPOSITION, FLOATS, STORAGES, Case, assert_same_bits, unary_case

from tests.emulated_board.board import Board, export_for_board, tvm_target
from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.interface import (
    Array,
    DequantizeConstants,
    FloatElementwiseConstants,
    IntegerElementwiseConstants,
    KernelRequest,
    NoConstants,
    NormalizationConstants,
    QuantizeConstants,
    Requantization,
)
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    Concat,
    Convert,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Multiply,
    Resize2D,
    Softmax,
    Window,
)
from tvm_hquant.tensor_format import STORAGE_DTYPE

CPU = "cortex-a72"
MAP = (1, 7, 9, 21)
GATED = Multiply((MAP, (1, 1, 1, 21)))
ENLARGED = Resize2D(MAP, (13, 17), (6, 0, 12), (18, -8, 34))
"""Corners of rows are aligned; of columns, the first outputs lie before the map and the last ones behind it."""
WINDOW = Window((3, 3), (2, 2), (1, 1, 1, 1))
CODES_END = Requantization(-90.0, 120.0, 101)
NORMALIZED = NormalizationConstants(
    np.linspace(-2, 2, 50).astype(np.float32),
    np.linspace(1, -1, 50).astype(np.float32),
    QuantizeConstants(0.03, CODES_END),
)


def board_cases() -> list[Case]:
    none = NoConstants()
    cases = [
        Case(
            KernelRequest(Add(MAP), (a, b), "uint8"),
            IntegerElementwiseConstants((3, 77), (np.float32(0.31), np.float32(0.0071)), CODES_END),
            index,
        )
        for index, (a, b) in enumerate([("uint8", "uint8"), ("uint16", "uint8")])
    ]
    for index, storage in enumerate(CODES):
        cases += [
            Case(
                KernelRequest(GATED, (storage, "uint8"), "uint8"),
                IntegerElementwiseConstants((3, 77), (np.float32(0.0071 / (1, 256)[index]),), CODES_END),
                index,
            ),
            Case(
                KernelRequest(ENLARGED, (storage,), "uint8"),
                IntegerElementwiseConstants((55,), (np.float32(0.91 / (1, 256)[index]),), CODES_END),
                index,
            ),
        ]
    cases += [
        unary_case(function, MAP, "float32", "float32", 11) for function in (*numerics.PARAMETER_COUNTS, COMPOSITION)
    ]
    operator = AveragePool2D(MAP, WINDOW, WINDOW.padding)
    factors = np.full(operator.output_shape[1:3], 0.7 / 9, np.float32)
    cases.append(
        Case(
            KernelRequest(operator, ("uint8",), "uint8"), IntegerElementwiseConstants((55,), (factors,), CODES_END), 12
        )
    )
    for seed, storage in enumerate(FLOATS):
        cases += [
            Case(KernelRequest(Convert(MAP), (storage,), "uint8"), QuantizeConstants(0.03125, CODES_END), seed),
            Case(KernelRequest(Convert(MAP), ("uint16",), storage), DequantizeConstants(0.0625, 300), seed),
            Case(KernelRequest(Convert(MAP), ("float32",), storage), none, seed),
            Case(KernelRequest(Softmax((3, 50), 1), (storage,), storage), none, seed),
            Case(KernelRequest(LocalResponseNormalization(MAP, 5, 0.1, 0.75, 1.0), (storage,), storage), none, seed),
            Case(KernelRequest(GroupNormalization((5, 50), 1, 1, 1e-5), (storage,), "uint8"), NORMALIZED, seed),
            Case(KernelRequest(GroupNormalization((1, 9, 50), 1, 2, 1e-5, 5), (storage,), "uint8"), NORMALIZED, seed),
            Case(KernelRequest(AveragePool2D(MAP, WINDOW), (storage,), storage), none, seed),
            Case(KernelRequest(GATED, (storage, storage), storage), none, seed),
            Case(KernelRequest(ENLARGED, (storage,), storage), none, seed),
            Case(KernelRequest(Add(MAP), (storage, storage), storage), FloatElementwiseConstants((-1.0, 6.0)), seed),
        ]
    for seed, storage in enumerate(STORAGES):
        cases += [
            Case(KernelRequest(MaxPool2D(MAP, WINDOW), (storage,), storage), none, seed),
            Case(KernelRequest(Concat((MAP, MAP), 3), (storage, storage), storage), none, seed),
            Case(KernelRequest(Movement("pad", (5, 6), (7, 9), (1, 1, 1, 2)), (storage,), storage), none, seed),
        ]
    return cases


def run_on_board(board: Board, cases: dict[str, Case], folder: Path) -> dict[str, Array]:
    """The outputs of the common kernels of all cases, compiled into one library."""
    functions, arguments = {}, {}
    for name, case in cases.items():
        kernel = CommonFamily(4).kernel(case.request)
        assert kernel is not None
        functions[name] = kernel.function.with_attr("global_symbol", name)
        output = np.zeros(case.request.operator.output_shape, STORAGE_DTYPE[case.request.output])
        arrays = [*case.inputs(), *kernel.pack(case.constants), output]
        arguments |= {f"{name}/{position}": array for position, array in enumerate(arrays)}
    library = export_for_board(
        tvm.compile(tvm.IRModule(functions), target=tvm_target(CPU), tir_pipeline=CPU_PIPELINE), folder / "kernels.so"
    )
    np.savez(folder / "arguments.npz", **arguments)
    script = Path(__file__).with_name("run_kernels_on_board.py")
    outputs = folder / "outputs.npz"
    result = board.run_python(script, library, folder / "arguments.npz", outputs, cpu=CPU, runtime_only=True, path=())
    assert result.returncode == 0, result.stderr
    with np.load(outputs) as loaded:
        return {name: loaded[name] for name in loaded.files}


def test_kernels_on_a_board_match_the_contract(emulated_board: Board, tmp_path: Path) -> None:
    """The same layers give the same bits on a Cortex-A72 as the oracle, and so as on this machine."""
    cases = {f"kernel_{index}": case for index, case in enumerate(board_cases())}
    outputs = run_on_board(emulated_board, cases, tmp_path)
    assert outputs.keys() == cases.keys()
    for name, case in cases.items():
        assert_same_bits(outputs[name], numerics.evaluate(case.request, case.constants, case.inputs()), case)
