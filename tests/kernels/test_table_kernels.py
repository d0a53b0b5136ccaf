"""Tables of codes in vectors of x86 against the arithmetic contract, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_matches_contract, seeds, unary_case

from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR
from tvm_hquant.kernels.registry import host_instruction_sets
from tvm_hquant.kernels.weightless.tables import table_kernel
from tvm_hquant.kernels.x86.byte_tables import ByteTables
from tvm_hquant.operators import Add, Unary

WIDTHS = {"avx2": (16, 32), "avx512_vnni": (16, 32, 64)}
TARGETS = {"avx2": {"kind": "llvm", "mcpu": "x86-64-v3"}, "avx512_vnni": {"kind": "llvm", "mcpu": "cascadelake"}}
HOST = host_instruction_sets()
INSTRUCTION_SETS = [
    pytest.param(name, marks=[] if name in HOST else pytest.mark.skip(reason=f"this CPU has no {name}"))
    for name in WIDTHS
]


class EveryCode(Case):
    """All codes one after the other, in every place of a vector."""

    def inputs(self) -> list[np.ndarray]:
        return [np.resize(np.arange(256, dtype=np.uint8), self.request.operator.output_shape)]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(length=st.integers(16, 800), seed=seeds, cores=st.sampled_from([1, 4]))
def test_random_tables_match_the_contract(instruction_set: str, length: int, seed: int, cores: int) -> None:
    """Any table gives each code its entry, whatever the tensor's length."""
    case = unary_case("silu", (length,), "uint8", "uint8", seed)
    processor = replace(ASSUMED_PROCESSOR, cores=cores)
    kernel = table_kernel(case.request, ByteTables(WIDTHS[instruction_set]), processor)
    assert_matches_contract(kernel, EveryCode(case.request, case.constants, seed), TARGETS[instruction_set])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_threads_share_large_tensors(instruction_set: str) -> None:
    """No gap and no seam between the parts of threads."""
    case = unary_case("silu", (3, 61, 67, 24), "uint8", "uint8", 5)
    assert_matches_contract(
        table_kernel(case.request, ByteTables(WIDTHS[instruction_set])), case, TARGETS[instruction_set]
    )


def test_tables_over_their_input_have_no_overlap() -> None:
    """Where the last vector overlaps the one before it, codes would be looked up twice."""
    tables = ByteTables((16, 32))

    def kernel_for(length: int) -> object:
        return table_kernel(KernelRequest(Unary((length,), "silu"), ("uint8",), "uint8", overwritten=0), tables)

    assert kernel_for(64) is not None
    assert kernel_for(65) is None


def test_what_has_no_table_of_codes_is_left_to_others() -> None:
    """Other operators and storages, and tensors that fill no vector."""
    tables = ByteTables((16, 32))
    assert table_kernel(KernelRequest(Unary((15,), "silu"), ("uint8",), "uint8"), tables) is None
    assert table_kernel(KernelRequest(Unary((64,), "silu"), ("uint8",), "float32"), tables) is None
    assert table_kernel(KernelRequest(Unary((64,), "silu"), ("float32",), "float32"), tables) is None
    assert table_kernel(KernelRequest(Add((64,)), ("uint8", "uint8"), "uint8"), tables) is None
