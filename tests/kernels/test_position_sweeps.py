"""Convolutions that go over the map for one position of the kernel after the other: every output gets every product that it
should, in the order of the window, so the bits are those of the contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.kernel_cases import Case, assert_same_bits
from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.convolution.position_sweeps import PositionSweeps
from tvm_hquant.kernels.convolution.template import conv2d_kernel
from tvm_hquant.kernels.dot_product import FloatDot
from tvm_hquant.kernels.interface import FloatAnchorConstants, Kernel, KernelRequest
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.kernels.registry import families_for_target, host_instruction_sets, select_kernel
from tvm_hquant.kernels.window_axis import window_axes
from tvm_hquant.operators import Conv2D, Epilogue, Window
from tvm_hquant.tensor_format import STORAGE_DTYPE

TARGETS = {"avx512_bf16": "cooperlake", "avx512_vnni": "cascadelake", "avx2": "x86-64-v3"}

RELU = Epilogue(has_bias=True, lower=0.0)
RESIDUAL = replace(RELU, has_residual=True)
SAME = Window((3, 3), padding=(1, 1, 1, 1))
LAYERS = {
    "avx2": [
        Conv2D((1, 7, 7, 32), 32, SAME, 1, RELU),
        Conv2D((2, 7, 7, 96), 40, SAME, 1, RESIDUAL),
        Conv2D((1, 14, 14, 32), 64, replace(SAME, strides=(2, 2)), 1, RELU),
        Conv2D((1, 7, 9, 32), 48, Window((5, 5), padding=(2, 2, 2, 2)), 1, RELU),
        Conv2D((1, 11, 9, 32), 48, Window((3, 3), (1, 1), (3, 2, 3, 2), (3, 2)), 1, RELU),
        Conv2D((1, 4, 5, 32), 40, Window((5, 4), (1, 2), (3, 2, 4, 3), (2, 1)), 1, RELU),
        Conv2D((1, 9, 9, 32), 64, Window((3, 3)), 1, Epilogue(has_bias=True)),
    ],
    "avx512_vnni": [
        Conv2D((2, 7, 7, 96), 120, SAME, 1, RESIDUAL),
        Conv2D((1, 14, 14, 96), 128, replace(SAME, strides=(2, 2)), 1, RELU),
        Conv2D((1, 21, 11, 64), 80, SAME, 1, RELU),
        Conv2D((1, 13, 7, 96), 128, Window((3, 3), (1, 1), (2, 1, 2, 1), (2, 1)), 1, RELU),
    ],
    "avx512_bf16": [
        Conv2D((2, 7, 7, 160), 120, SAME, 1, RESIDUAL),
        Conv2D((1, 14, 14, 160), 128, replace(SAME, strides=(2, 2)), 1, RELU),
    ],
}
"""Strides, dilation, larger windows, several images, residuals, channels that do not fill the last tile, windows with positions
that reach few outputs; on AVX-512 sums of two bands of rows, the last of them shorter."""


def case(operator: Conv2D, storage: str, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    weights = numerics.narrow(rng.normal(size=operator.weight_shape).astype(np.float32), storage)
    bias = rng.normal(size=operator.out_channels).astype(np.float32)
    constants = FloatAnchorConstants(weights, bias, max(-2.0, operator.epilogue.lower), 60.0)
    inputs = (storage,) * len(input_shapes(operator))
    return Case(KernelRequest(operator, inputs, storage, storage, finite_weights=True), constants, seed)


def kernel_of_sweeps(family: str, request: KernelRequest) -> Kernel:
    """The kernel that the family has. With AVX-512, only float32 maps of many channels are swept, which would take long here:
    loads that add to the time of products make others be swept, too."""
    if family == "avx512_vnni":
        return conv2d_kernel(request, FloatDot(16, 32, prefetches=True, sweeps=True), family)
    return select_kernel(families_for_target((family,)), request)


@pytest.mark.parametrize("family", LAYERS)
def test_sweeps_are_exact(family: str) -> None:
    """Activations are infinite, NaN, denormal and −0, too; all layers of a family are compiled together."""
    if family not in host_instruction_sets():
        pytest.skip(f"this CPU has no {family}")
    storage = "bfloat16" if family == "avx512_bf16" else "float32"
    cases = [case(operator, storage, seed) for seed, operator in enumerate(LAYERS[family])]
    kernels = [kernel_of_sweeps(family, c.request) for c in cases]
    assert all(kernel.name.startswith(f"{family}.") and kernel.name.endswith(" sweeps]") for kernel in kernels)
    functions = {f"layer_{i}": k.function.with_attr("global_symbol", f"layer_{i}") for i, k in enumerate(kernels)}
    target = tvm.target.Target({"kind": "llvm", "mcpu": TARGETS[family]})
    library = tvm.compile(tvm.IRModule(functions), target=target, tir_pipeline=CPU_PIPELINE)
    for i, (kernel, c) in enumerate(zip(kernels, cases, strict=True)):
        inputs = c.inputs()
        output = tvm.runtime.tensor(np.full(c.request.operator.output_shape, 77, STORAGE_DTYPE[storage]))
        library[f"layer_{i}"](*map(tvm.runtime.tensor, (*inputs, *kernel.pack(c.constants))), output)
        assert_same_bits(output.numpy(), numerics.evaluate(c.request, c.constants, inputs), c)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 4)] * 4),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pixels=st.integers(1, 8),
    pixel_bytes=st.sampled_from([64, 1024, 4096]),
    band_bytes=st.sampled_from([4096, 64 * 1024]),
)
def test_every_output_takes_every_position_that_it_reaches_once(
    size, kernel, strides, padding, dilation, pixels, pixel_bytes, band_bytes
) -> None:
    """What a kernel does with the table, done here: tiles of a sweep read and add where the window says, once each, position
    by position in the order of the window, and no tile has more pixels than it may."""
    window = Window(kernel, strides, padding, dilation)
    rows, columns = axes = window_axes((1, *size, 3), window)
    if min(rows.output_size, columns.output_size) < 1:
        return
    sweeps = PositionSweeps(axes, pixels, pixel_bytes, band_bytes, lambda count: max(count, 3) + 1)
    channels, sums, entry = 3, 16, 3 + len(sweeps.sizes)
    table = sweeps.table(channels, sums)
    assert max(sweeps.sizes, default=0) <= pixels
    assert sweeps.band_rows == 1 or sweeps.band_rows * columns.output_size * pixel_bytes <= 2 * band_bytes
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    positions = kernel[0] * kernel[1]
    for number in range(sweeps.bands * positions):
        first, place, listed, *tiles = map(int, table[number * entry : (number + 1) * entry])
        for i in range(sum(size * count for size, count in zip(sweeps.sizes, tiles, strict=True))):
            read, added = table[listed + 2 * i : listed + 2 * i + 2]
            top = sweeps.tops[number // positions]
            y, x = divmod(int(place + added) // sums, columns.output_size)
            found.setdefault((top + y, x), []).append((number % positions, int(first + read) // channels))
    for y in range(rows.output_size):
        for x in range(columns.output_size):
            expected = [
                (
                    ky * kernel[1] + kx,
                    (y * strides[0] - padding[0] + ky * dilation[0]) * size[1]
                    + x * strides[1]
                    - padding[1]
                    + kx * dilation[1],
                )
                for ky in range(kernel[0])
                for kx in range(kernel[1])
                if rows.reaches(y, ky) and columns.reaches(x, kx)
            ]
            assert found.get((y, x), []) == expected
