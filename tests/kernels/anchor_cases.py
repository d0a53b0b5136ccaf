"""Convolutions and dense layers for tests of kernels: random requests, and their check against the contract."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.convolution.saturation import centred_products, saturation_free_pairs
from tvm_hquant.kernels.epilogues.proven_endings import proven_ending
from tvm_hquant.kernels.instruction_set import load_instruction_set
from tvm_hquant.kernels.interface import (
    FloatAnchorConstants,
    IntegerAnchorConstants,
    Kernel,
    KernelRequest,
    Requantization,
)
from tvm_hquant.kernels.kernel_function import activation_types, input_place, input_shapes, interleaved_place
from tvm_hquant.kernels.processor import ASSUMED_PROCESSOR, Processor
from tvm_hquant.kernels.registry import families_for_target, host_instruction_sets, select_kernel
from tvm_hquant.operators import Conv2D, Dense, Epilogue, Window
from tvm_hquant.tensor_format import STORAGE_DTYPE

HOST = host_instruction_sets()


def target_of_host(name: str) -> dict:
    """What a machine with an instruction set compiles for, as the set declares it."""
    host = load_instruction_set(name).host
    assert host is not None
    return {"kind": "llvm", "mattr": list(host.mattr)} | ({"mcpu": host.mcpu} if host.mcpu else {})


TARGETS = {
    "avx512_bf16": {"kind": "llvm", "mcpu": "cooperlake"},
    "avx512_vnni": {"kind": "llvm", "mcpu": "cascadelake"},
    # LLVM encodes the instruction as AVX-512 has it where it may.
    "avx_vnni": {"kind": "llvm", "mcpu": "cascadelake"},
    "avx2": {"kind": "llvm", "mcpu": "x86-64-v3"},
    "portable": {"kind": "llvm"},
}
_OTHERS = [name for name in HOST if name not in TARGETS]
TARGETS |= {name: target_of_host(name) for name in _OTHERS}
_RUNS = {*HOST, *(["avx_vnni"] if "avx512_vnni" in HOST else [])}


def families(*names: str) -> list:
    """Parameters for the named families; those that this CPU cannot run are skipped."""
    return [
        pytest.param(name, marks=[] if name in _RUNS else pytest.mark.skip(reason=f"this CPU has no {name}"))
        for name in names
    ]


FAMILIES = families("avx512_vnni", "avx2", "portable")
"""Families with a kernel for every request."""

AT_HAND = [*FAMILIES, *families(*_OTHERS)]
"""These, and every other instruction set that this CPU has and that no list here names: one that was just added, too."""


def run_kernel(kernel: Kernel, constants, inputs: list[np.ndarray], target: dict) -> np.ndarray:
    """Compiles a kernel and calls it once."""
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, target=tvm.target.Target(target), tir_pipeline=CPU_PIPELINE)
    request = kernel.request
    output = tvm.runtime.tensor(np.zeros(request.output_shape, STORAGE_DTYPE[request.output]))
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*inputs, *kernel.pack(constants))]
    library["kernel"](*arguments, output)
    return output.numpy()


def random_activations(rng: np.random.Generator, shape: tuple[int, ...], storage: str) -> np.ndarray:
    if storage == "uint8":
        return rng.integers(0, 256, shape).astype(np.uint8)
    if storage == "uint16":
        return rng.integers(0, 65536, shape).astype(np.uint16)
    values = rng.normal(size=shape).astype(np.float32)
    return numerics.narrow(values, storage)


def random_case(rng: np.random.Generator, request: KernelRequest, weight_limit: int = 127):
    """Constants and inputs for a request; some weights and activations are extreme."""
    operator = request.operator
    conv = operator.as_conv2d() if isinstance(operator, Dense) else operator
    inputs = [
        random_activations(rng, shape, storage)
        for shape, storage in zip(input_shapes(operator), request.inputs, strict=True)
    ]
    if request.weights == "int8":
        limit = weight_limit
        codes = rng.integers(-limit, limit + 1, (request.weight_points, *conv.weight_shape)).astype(np.int8)
        largest = 255 if request.inputs[0] == "uint8" else 65535
        size = math.sqrt(math.prod(conv.weight_shape[1:])) * limit * largest / 4
        out = {"uint8": 128.0, "uint16": 30000.0}.get(request.output, 3.0)
        multiplier = (rng.uniform(0.3, 1.5, (request.weight_points, conv.out_channels)) * out / size).astype(np.float32)
        zero_point = {"uint8": 7, "uint16": 1234}.get(request.output, 0)
        top = {"uint8": 255 - zero_point, "uint16": 65535 - zero_point}.get(request.output, 2.5)
        residual = len(request.inputs) > 1
        constants = IntegerAnchorConstants(
            codes,
            int(rng.integers(0, largest + 1)),
            multiplier,
            rng.normal(scale=out / 4, size=conv.out_channels).astype(np.float32),
            Requantization(float(-zero_point), float(top), zero_point),
            0.37 * out / 128 if residual else 0.0,
            11 if residual else 0,
        )
        if request.weights == "int8":
            proven = {
                "saturation_free_pairs": saturation_free_pairs(codes),
                "centred_products": centred_products(codes),
            }
            if set(request.inputs) | {request.output} == {"uint8"}:
                proven["ending"] = proven_ending(constants)
            request = replace(request, **proven)
        return request, constants, inputs
    weights = numerics.narrow(rng.normal(size=conv.weight_shape).astype(np.float32), request.weights)
    bias = rng.normal(size=conv.out_channels).astype(np.float32) * np.float32(operator.epilogue.has_bias)
    lower = max(-2.0, operator.epilogue.lower)
    return replace(request, finite_weights=True), FloatAnchorConstants(weights, bias, lower, 3.5), inputs


def check(
    family: str,
    request: KernelRequest,
    seed: int = 0,
    weight_limit: int = 127,
    processor: Processor = ASSUMED_PROCESSOR,
) -> Kernel:
    rng = np.random.default_rng(seed)
    request, constants, inputs = random_case(rng, request, weight_limit)
    # A set that no list here names may leave requests to the next one of a target's list.
    names = (family, "portable") if family in _OTHERS else (family,)
    kernel = select_kernel(families_for_target(names, processor), request)
    activations = in_buffers(rng, request, inputs)
    actual = run_kernel(kernel, constants, activations, TARGETS[family])
    expected = numerics.evaluate(request, constants, inputs)
    if request.shuffled:
        in_groups = expected.reshape(*expected.shape[:-1], request.shuffled, -1)
        expected = in_groups.swapaxes(-1, -2).reshape(expected.shape)
    if request.interleaved is not None:
        place = interleaved_place(request)
        other = activations[-1][..., place.offset : place.offset + expected.shape[-1]]
        pair = [expected, other] if request.interleaved.position == 0 else [other, expected]
        expected = np.stack(pair, axis=-1).reshape(actual.shape)
    if request.placement is not None:
        first, inner = request.output_offset, expected
        expected = np.zeros_like(actual)
        expected[..., first : first + inner.shape[-1]] = inner
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected, err_msg=kernel.name)
    return kernel


def in_buffers(rng: np.random.Generator, request: KernelRequest, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """What a kernel is given for the inputs of its operator; whatever else lies in wider buffers is random."""
    if request.has_own_buffers:
        return inputs
    storages = (*request.inputs, request.output)
    buffers = [
        random_activations(rng, shape, s) for (shape, _), s in zip(activation_types(request), storages, strict=False)
    ]
    for number, array in enumerate(inputs):
        first = input_place(request, number).offset
        buffers[number][..., first : first + array.shape[-1]] = array
    return buffers


CASES = {
    "3x3 padded": Conv2D((1, 9, 7, 8), 24, Window((3, 3), padding=(1, 1, 1, 1)), 1, Epilogue(has_bias=True)),
    "1x1": Conv2D((1, 5, 5, 12), 40, Window((1, 1))),
    "1x1 strided": Conv2D((2, 6, 7, 8), 16, Window((1, 1), strides=(2, 2))),
    "stem, three channels": Conv2D((1, 13, 13, 3), 16, Window((3, 3), (2, 2), (0, 0, 1, 1))),
    "asymmetric, dilated": Conv2D((1, 11, 10, 5), 19, Window((3, 2), (1, 2), (2, 0, 1, 3), (2, 1))),
    "window larger than the map": Conv2D((2, 4, 5, 8), 20, Window((5, 4), (1, 2), (3, 2, 4, 3), (2, 1))),
    "grouped": Conv2D((1, 6, 6, 60), 60, Window((3, 3), padding=(1, 1, 1, 1)), groups=3),
    "grouped, few channels": Conv2D((1, 4, 4, 12), 8, Window((1, 1)), groups=4),
    "channel multiplier": Conv2D((1, 5, 5, 6), 12, Window((3, 3), padding=(1, 1, 1, 1)), groups=6),
    "depthwise": Conv2D((1, 9, 8, 21), 21, Window((3, 3), (2, 1), (1, 1, 1, 1)), groups=21),
    "depthwise, few channels": Conv2D((1, 6, 6, 3), 3, Window((5, 5), padding=(2, 2, 2, 2)), groups=3),
    "few outputs": Conv2D((1, 3, 3, 16), 2, Window((1, 1))),
    "dense": Dense(1, 37, 10),
    "dense, rows": Dense(5, 16, 33),
}

windows = st.builds(
    Window,
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
