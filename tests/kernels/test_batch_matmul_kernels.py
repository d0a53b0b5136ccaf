"""Products of two activations against the arithmetic contract, bit for bit, on every instruction set at hand.

Protects attention: second matrices packed at run time, in any order of axes, give what the simulator and ``numerics`` say.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_matches_contract, matmul_operators, matmuls, run_kernel

from tests.kernels.anchor_cases import TARGETS, families
from tvm_hquant import numerics
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.interface import IntegerElementwiseConstants, KernelRequest, NoConstants, Requantization
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES
from tvm_hquant.operators import BatchMatmul

few = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
END = Requantization(-100.0, 155.0, 100)


def plain(batch: int, rows: int, depth: int, columns: int) -> BatchMatmul:
    order = (0, 1, 2)
    return BatchMatmul(((batch, rows, depth), (batch, depth, columns)), (order, order), order)


@pytest.mark.parametrize("family", families("avx512_vnni", "avx_vnni", "avx2", "portable"))
@few
@given(data=st.data())
def test_random_products_match_the_contract(family: str, data: st.DataObject) -> None:
    """Any order of axes, repeated matrices, odd sizes, all storages, a scale."""
    case = data.draw(matmuls())
    if family == "avx_vnni" and case.request.inputs[0] != "uint8":
        return
    assert_matches_contract(ANCHOR_FAMILIES[family].kernel(case.request), case, TARGETS[family])


@pytest.mark.parametrize("family", families("avx512_bf16"))
@few
@given(operator=matmul_operators(), seed=st.integers(0, 2**32 - 1))
def test_products_of_bfloat16_match_the_contract(family: str, operator: BatchMatmul, seed: int) -> None:
    """``vdpbf16ps`` takes pairs of values in the reverse order: second matrices are packed for that. Values are ordinary:
    the instruction takes denormal ones for zero."""
    request = KernelRequest(operator, ("bfloat16", "bfloat16"), "float32")

    class Ordinary(Case):
        def inputs(self) -> list[np.ndarray]:
            rng = np.random.default_rng(self.seed)
            return [
                numerics.narrow(rng.normal(size=shape).astype(np.float32), "bfloat16")
                for shape in operator.input_shapes
            ]

    kernel = ANCHOR_FAMILIES[family].kernel(request)
    assert (kernel is None) == (operator.depth % 2 == 1)
    if kernel is not None:
        assert_matches_contract(kernel, Ordinary(request, NoConstants(), seed), TARGETS[family])


@pytest.mark.parametrize("family", families("avx512_vnni", "avx2"))
def test_attention_of_many_heads(family: str) -> None:
    """What threads share has no gap and no seam: heads that lie interleaved in memory, keys transposed, odd tokens."""
    split, swapped = (0, 2, 1, 3), (0, 2, 3, 1)
    scores = BatchMatmul(((1, 67, 4, 32), (1, 67, 4, 32)), (split, swapped), (0, 1, 2, 3), 0.125)
    mixed = BatchMatmul(((1, 4, 67, 67), (1, 67, 4, 32)), ((0, 1, 2, 3), split), split)
    constants = IntegerElementwiseConstants((113, 128), (np.float32(0.0007),), END)
    for operator, output in ((scores, "float32"), (mixed, "uint8")):
        assert operator.macs > 100_000
        case = Case(KernelRequest(operator, ("uint8", "uint8"), output), constants, 3)
        assert_matches_contract(ANCHOR_FAMILIES[family].kernel(case.request), case, TARGETS[family])
    case = Case(KernelRequest(scores, ("float32", "float32"), "float32"), NoConstants(), 4)
    assert_matches_contract(ANCHOR_FAMILIES[family].kernel(case.request), case, TARGETS[family])


@pytest.mark.parametrize("family", families("avx512_vnni", "avx2", "portable"))
def test_extreme_codes_do_not_saturate(family: str) -> None:
    """The lowest code of the second matrix is −128, which weights never are."""

    class Extreme(Case):
        def inputs(self) -> list[np.ndarray]:
            return [
                np.full((1, 3, 64), value, np.uint8)[:, : shape[1], : shape[2]]
                if shape[1] == 3
                else np.zeros(shape, np.uint8)
                for value, shape in zip((255, 0), ((1, 3, 64), (1, 64, 40)), strict=True)
            ]

    request = KernelRequest(plain(1, 3, 64, 40), ("uint8", "uint8"), "float32")
    end = Requantization(-1e9, 1e9, 0)
    constants = IntegerElementwiseConstants((0, 128), (np.float32(1),), end)
    got = run_kernel(ANCHOR_FAMILIES[family].kernel(request), Extreme(request, constants, 0), TARGETS[family])
    assert (got == -128 * 255 * 64).all()


def test_other_second_codes_are_refused() -> None:
    """Kernels know that the second matrix is symmetric; constants that say otherwise are an error, not a wrong result."""
    kernel = ANCHOR_FAMILIES["avx2"].kernel(KernelRequest(plain(1, 3, 8, 8), ("uint8", "uint8"), "uint8"))
    assert kernel is not None
    with pytest.raises(KernelError, match="stored with zero point 128, not 3"):
        kernel.pack(IntegerElementwiseConstants((0, 3), (np.float32(1),), END))


@pytest.mark.parametrize("inputs", [("uint16", "uint8"), ("uint8", "float32")])
def test_other_storages_have_no_kernel(inputs: tuple[str, str]) -> None:
    """16-bit codes and codes times floats are left out by every family."""
    request = KernelRequest(plain(1, 3, 8, 8), inputs, "float32")
    assert all(family.kernel(request) is None for family in (ReferenceFamily(), *ANCHOR_FAMILIES.values()))
