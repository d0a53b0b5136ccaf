"""Maps of codes times one factor a channel, in vectors of bytes, against the arithmetic contract, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_matches_contract, seeds

from tvm_hquant.kernels.interface import IntegerElementwiseConstants, KernelRequest, Placement, Requantization
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR
from tvm_hquant.kernels.registry import host_instruction_sets
from tvm_hquant.kernels.weightless.gating import gating_kernel
from tvm_hquant.kernels.x86.byte_vectors import ByteVectors
from tvm_hquant.operators import Multiply

WIDTHS = {"avx2": (16, 32), "avx512_vnni": (16, 32, 64)}
TARGETS = {"avx2": {"kind": "llvm", "mcpu": "x86-64-v3"}, "avx512_vnni": {"kind": "llvm", "mcpu": "cascadelake"}}
HOST = host_instruction_sets()
INSTRUCTION_SETS = [
    pytest.param(name, marks=[] if name in HOST else pytest.mark.skip(reason=f"this CPU has no {name}"))
    for name in WIDTHS
]


def vectors(instruction_set: str) -> list[ByteVectors]:
    return [ByteVectors(width, "vpmaddwd") for width in WIDTHS[instruction_set]]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    images=st.integers(1, 3),
    size=st.tuples(st.integers(1, 5), st.integers(1, 8)),
    channels=st.one_of(st.integers(16, 150), st.sampled_from([24, 32, 40, 48, 72, 96, 144])),
    gate=st.sampled_from(["images", "one", "flat"]),
    gated=st.integers(0, 1),
    cores=st.sampled_from([1, 4]),
    places=st.sampled_from([None, (3, 0), (0, 5)]),
    seed=seeds,
)
def test_gates_match_the_contract(instruction_set, images, size, channels, gate, gated, cores, places, seed) -> None:
    """Any shapes, either order of the inputs, gates for each image or one for all, in buffers of their own or wider ones;
    values beyond the codes are cut off."""
    rng = np.random.default_rng(seed)
    factors = {"images": (images, 1, 1, channels), "one": (1, 1, 1, channels), "flat": (channels,)}[gate]
    shapes = [factors, factors]
    shapes[gated] = (images, *size, channels)
    zero_point = int(rng.integers(0, 256))
    limits = sorted(int(v) for v in rng.integers(0, 256, 2)) if rng.integers(2) else [0, 255]
    end = Requantization(float(limits[0] - zero_point), float(limits[1] - zero_point), zero_point)
    multiplier = np.float32(10.0 ** rng.uniform(-4, 1))
    zero_points = tuple(int(z) for z in rng.integers(0, 256, 2))
    sources = tuple(Placement(offset, channels + 7) for offset in places) if places else ()
    request = KernelRequest(Multiply((shapes[0], shapes[1])), ("uint8", "uint8"), "uint8", sources=sources)
    kernel = gating_kernel(request, vectors(instruction_set), replace(ASSUMED_PROCESSOR, cores=cores))
    constants = IntegerElementwiseConstants(zero_points, (multiplier,), end)
    assert_matches_contract(kernel, Case(request, constants, seed), TARGETS[instruction_set])


@pytest.mark.parametrize(
    "request_",
    [
        KernelRequest(Multiply(((1, 4, 4, 15), (1, 1, 1, 15))), ("uint8", "uint8"), "uint8"),
        KernelRequest(Multiply(((1, 3, 3, 8), (1, 1, 1, 8))), ("uint8", "uint8"), "uint8"),
        KernelRequest(Multiply(((1, 4, 4, 32), (1, 4, 4, 32))), ("uint8", "uint8"), "uint8"),
        KernelRequest(Multiply(((1, 4, 4, 32), (1, 4, 1, 32))), ("uint8", "uint8"), "uint8"),
        KernelRequest(Multiply(((1, 4, 4, 32), (1, 4, 4, 1))), ("uint8", "uint8"), "uint8"),
        KernelRequest(Multiply(((2, 4, 4, 32), (4, 1, 32))), ("uint8", "uint8"), "uint8"),
        KernelRequest(Multiply(((1, 4, 4, 32), (1, 1, 1, 32))), ("uint16", "uint8"), "uint8"),
        KernelRequest(Multiply(((1, 4, 4, 32), (1, 1, 1, 32))), ("uint8", "uint8"), "float32"),
    ],
    ids=lambda r: f"{r.operator.input_shapes} {r.inputs[0]} {r.output}",
)
def test_other_products_are_left_to_others(request_: KernelRequest) -> None:
    """Too few channels, factors of another form, and other storages have the general kernel."""
    assert gating_kernel(request_, [ByteVectors(16, "vpmaddwd")]) is None
