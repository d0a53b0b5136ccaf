"""How near the convolution and dense kernels come to what a core can do, for every layer shape of five networks.

The yardstick is measured on the same core: the arithmetic of the instruction set's dot product on vectors that lie in
the first-level cache. Peak and layers are timed in turns, call by call, in processor time of the one thread that computes,
and medians are compared. Layers are called with several sets of weights in rotation, larger together than the second-level
cache, as in a network, where weights have not been read since the sample before.

    python -m benchmarks.convolution_layers --networks resnet50 --instruction-set avx2 --precision a8w7

A row per shape: how often the network has it, the kernel, microseconds a call, billions of operations a second, share of
the peak, and how much of the network's time over all its shapes would be saved at the peak. Depthwise layers are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from benchmarks.zoo import ZooModel
from tests.light_models import light_model_path, load_random_weights
from tvm_hquant.cli.tables import print_table
from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.convolution.saturation import saturation_free_pairs
from tvm_hquant.kernels.dot_product import DotProduct
from tvm_hquant.kernels.interface import (
    Array,
    FloatAnchorConstants,
    IntegerAnchorConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
    Requantization,
)
from tvm_hquant.kernels.kernel_function import imported_functions, input_shapes
from tvm_hquant.kernels.primitives import STACK
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES, host_instruction_sets, select_kernel
from tvm_hquant.kernels.vector_loops import load, store
from tvm_hquant.layers import read_layers
from tvm_hquant.operators import Conv2D, Dense
from tvm_hquant.precision import parse_precision
from tvm_hquant.preparation import prepare_module
from tvm_hquant.target_spec import load_target_spec
from tvm_hquant.tensor_format import STORAGE_DTYPE, Storage, float_format

NETWORKS = ("resnet50", "inception_v1", "shufflenet", "squeezenet", "imagenet_mobilenetv2_1.0")
SPECS = {
    "avx512_bf16": "x86-64-avx512-bf16", "avx512_vnni": "x86-64-avx512-vnni", "avx_vnni": "x86-64-avx-vnni",
    "avx2": "x86-64-avx2", "portable": "portable-cpu",
}  # fmt: skip
_ROTATED_BYTES = 4 * 2**20
"""More than the second-level cache of a core has."""
_SAMPLE_SECONDS = 3e-4
_PEAK_PIXELS, _PEAK_VECTORS, _PEAK_STEPS = 2, 5, 4096

Operator = Conv2D | Dense


@dataclass(frozen=True, eq=False)
class Timed:
    """A compiled function with sets of arguments to call it with in turn."""

    function: Any
    arguments: Sequence[Sequence[Any]]

    def seconds(self) -> list[float]:
        """Seconds of this thread in every call, one with each set of arguments, or more where they are soon done."""
        found: list[float] = []
        while sum(found) < _SAMPLE_SECONDS or len(found) < len(self.arguments):
            arguments = self.arguments[len(found) % len(self.arguments)]
            start = time.thread_time()
            self.function(*arguments)
            found.append(time.thread_time() - start)
        return found


def main() -> None:
    """Prints a table for every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--instruction-set", default=host_instruction_sets()[0], choices=SPECS)
    parser.add_argument("--precision", default="a8w8")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = "1"
    spec = load_target_spec(SPECS[arguments.instruction_set])
    families = [ANCHOR_FAMILIES[name] for name in spec.instruction_sets]
    for network in arguments.networks.split(","):
        _measure(network, families, arguments.precision, spec.tvm_target(), arguments.rounds)


def network_layers(network: str) -> Counter[Operator]:
    """The convolution and dense layers of a network, but depthwise ones, with how many there are of each."""
    zoo = ZooModel(f"{network}.onnx")
    model = str(zoo.path) if zoo.path.exists() else load_random_weights(onnx.load(light_model_path(network)), 0)
    return Counter(
        layer.operator
        for layer in read_layers(prepare_module(model)).layers
        if isinstance(layer.operator, Dense) or (isinstance(layer.operator, Conv2D) and not layer.operator.is_depthwise)
    )


def random_codes(rng: np.random.Generator, limit: int, shape: tuple[int, ...]) -> Array:
    """Normally distributed weights, of which the largest of every output channel becomes ``limit``: int8 [points, out, …]."""
    values = rng.normal(size=shape)
    largest = np.abs(values).reshape(*shape[:2], -1).max(axis=2).reshape(*shape[:2], *[1] * (len(shape) - 2))
    return np.asarray(np.rint(values * (limit / largest)), np.int8)


def random_layer(operator: Operator, precision: str, seed: int) -> tuple[KernelRequest, LayerConstants]:
    """A request and random constants of a layer in a precision."""
    rng = np.random.default_rng(seed)
    shape = operator.weight_shape if isinstance(operator, Conv2D) else (*operator.weight_shape, 1, 1)
    wanted = parse_precision(precision)
    storage: Storage = "uint8" if wanted.is_integer else float_format(wanted).storage
    stored: tuple[Storage, ...] = (storage, storage) if operator.epilogue.has_residual else (storage,)
    if wanted.is_integer:
        limit = 2 ** (wanted.weight_bits - 1) - 1
        codes = random_codes(rng, limit, (1, *shape))
        multiplier = np.full((1, shape[0]), 3e-2 / limit / np.sqrt(np.prod(shape[1:])), np.float32)
        zeros = np.zeros(shape[0], np.float32)
        ends = Requantization(-128.0, 127.0, 128)
        request = KernelRequest(operator, stored, "uint8", "int8", saturation_free_pairs=saturation_free_pairs(codes))
        return request, IntegerAnchorConstants(codes, 128, multiplier, zeros, ends, 0.5, 128)
    weights = rng.normal(size=shape).astype(np.float32)
    values = weights if storage == "float32" else _stored(weights, storage)
    request = KernelRequest(operator, stored, storage, storage, finite_weights=True)
    return request, FloatAnchorConstants(values, np.zeros(shape[0], np.float32), -np.inf, np.inf)


def _stored(values: Array, storage: Storage) -> Array:
    return (values.view(np.uint32) >> 16).astype(np.uint16) if storage == "bfloat16" else values.astype(storage)


def timed_kernel(kernel: Kernel, library: Any, name: str, constants: Sequence[LayerConstants]) -> Timed:
    """A kernel with a set of arguments for each set of constants; activations are shared."""
    request = kernel.request
    activations = [
        tvm.runtime.tensor(np.ones(shape, STORAGE_DTYPE[storage]))
        for shape, storage in zip(input_shapes(request.operator), request.inputs, strict=True)
    ]
    output = tvm.runtime.tensor(np.zeros(request.operator.output_shape, STORAGE_DTYPE[request.output]))
    packed = [[tvm.runtime.tensor(a) for a in kernel.pack(c)] for c in constants]
    return Timed(library[name], [[*activations, *arrays, output] for arrays in packed])


def peak_function(dot: DotProduct) -> Any:
    """Accumulates products of operands in registers and vectors in the first-level cache: (weights, source, sums)."""
    count = dot.lanes * dot.products
    places = [(i, j) for i in range(_PEAK_PIXELS) for j in range(_PEAK_VECTORS)]
    weight_size, source_size, sum_size = peak_sizes(dot)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        weights = T.arg("weights", T.buffer((weight_size,), dot.weight_dtype))
        source = T.arg("source", T.buffer((source_size,), dot.operand_dtype))
        sums = T.arg("sums", T.buffer((sum_size,), dot.accumulator_dtype))
        T.func_attr({"tirx.noalias": True, "global_symbol": "peak"})
        registers = {place: T.alloc_buffer((dot.lanes,), dot.accumulator_dtype, scope=STACK) for place in places}
        for number, register in enumerate(registers.values()):
            store(register, 0, load(sums, number * dot.lanes, dot.lanes), dot.lanes)
        operands = [
            [T.bind(operand) for operand in dot.operands(source, [i * dot.chain * dot.products], dot.chain)]
            for i in range(_PEAK_PIXELS)
        ]
        with imported_functions(dot.llvm_functions), T.serial(_PEAK_STEPS) as step:
            for j in range(_PEAK_VECTORS):
                # Another vector in every step, or the products would leave the loop.
                base = (step % 2 * _PEAK_VECTORS + j) * dot.chain * count
                vectors = [T.bind(load(weights, base + c * count, count)) for c in range(dot.chain)]
                for i in range(_PEAK_PIXELS):
                    value = dot.accumulate(load(registers[i, j], 0, dot.lanes), operands[i], vectors)
                    store(registers[i, j], 0, value, dot.lanes)
        for number, register in enumerate(registers.values()):
            store(sums, number * dot.lanes, load(register, 0, dot.lanes), dot.lanes)
    return builder.get()


def peak_sizes(dot: DotProduct) -> tuple[int, int, int]:
    """Elements of the arguments of :func:`peak_function`."""
    return (
        2 * _PEAK_VECTORS * dot.chain * dot.lanes * dot.products,
        _PEAK_PIXELS * dot.chain * dot.products,
        _PEAK_PIXELS * _PEAK_VECTORS * dot.lanes,
    )


def timed_peak(dot: DotProduct, target: Any) -> tuple[Timed, int]:
    """The peak of a dot product, and its multiply-accumulates a call."""
    library = tvm.compile(tvm.IRModule({"peak": peak_function(dot)}), target=target)
    dtypes = (dot.weight_dtype, dot.operand_dtype, dot.accumulator_dtype)
    arrays = [np.zeros(size, dtype) for size, dtype in zip(peak_sizes(dot), dtypes, strict=True)]
    macs = _PEAK_STEPS * _PEAK_PIXELS * _PEAK_VECTORS * dot.chain * dot.lanes * dot.products
    return Timed(library["peak"], [[tvm.runtime.tensor(a) for a in arrays]]), macs


def _measure(network: str, families: Sequence[AnchorFamily], precision: str, target: Any, rounds: int) -> None:
    counts = network_layers(network)
    kernels, functions = [], {}
    constants: list[list[LayerConstants]] = []
    for number, operator in enumerate(counts):
        request, first = random_layer(operator, precision, number)
        kernel = select_kernel(families, request)
        copies = max(1, min(_ROTATED_BYTES // kernel.pack(first)[0].nbytes, 16))
        kernels.append(kernel)
        constants.append([first] * copies)
        functions[f"layer_{number}"] = kernel.function.with_attr("global_symbol", f"layer_{number}")
    start = time.perf_counter()
    library = tvm.compile(tvm.IRModule(functions), target=target)
    compiled = time.perf_counter() - start
    layers = [
        timed_kernel(k, library, f"layer_{n}", c) for n, (k, c) in enumerate(zip(kernels, constants, strict=True))
    ]
    # One dot product stands for all: that of the layers with most of the work.
    largest = max(zip(kernels, counts.items(), strict=True), key=lambda entry: entry[1][0].macs * entry[1][1])[0]
    peak, peak_macs = timed_peak(_dot(families, largest.request), target)
    samples: list[list[float]] = [[] for _ in range(len(layers) + 1)]
    for _ in range(rounds):
        for timed, found in zip([peak, *layers], samples, strict=True):
            found.extend(timed.seconds())
    medians = [statistics.median(found) for found in samples]
    _print(network, counts, kernels, medians, 2 * peak_macs / medians[0], compiled)


def _dot(families: Sequence[AnchorFamily], request: KernelRequest) -> DotProduct:
    return next(dot for family in families if (dot := family.dot(request)) is not None)


def _print(
    network: str,
    counts: Counter[Operator],
    kernels: Sequence[Kernel],
    medians: Sequence[float],
    peak: float,
    compiled: float,
) -> None:
    total = sum(count * seconds for count, seconds in zip(counts.values(), medians[1:], strict=True))
    operations = sum(2 * count * operator.macs for operator, count in counts.items())
    rows = []
    for (operator, count), kernel, seconds in zip(counts.items(), kernels, medians[1:], strict=True):
        lost = count * (seconds - 2 * operator.macs / peak) / total
        rows.append((lost, (
            str(count), _shape(operator), kernel.name, f"{seconds * 1e6:.1f}",
            f"{2 * operator.macs / seconds / 1e9:.0f}", f"{2 * operator.macs / seconds / peak:.0%}", f"{lost:.1%}",
        )))  # fmt: skip
    print_table(
        ("count", "layer", "kernel", "µs", "GOP/s", "of peak", "lost"),
        [row for _, row in sorted(rows, reverse=True)],
        f"{network}: {total * 1e3:.2f} ms, {operations / total / 1e9:.0f} GOP/s, {operations / total / peak:.0%} of the peak "
        f"of {peak / 1e9:.0f}; compiled in {compiled:.1f} s",
    )


def _shape(operator: Operator) -> str:
    if isinstance(operator, Dense):
        return f"{operator.rows} × {operator.in_features} → {operator.out_features}"
    (kh, kw), (sh, _) = operator.window.kernel, operator.window.strides
    _, h, w, channels = operator.input_shape
    extras = [f"/{sh}" if sh > 1 else "", f"groups {operator.groups}" if operator.groups > 1 else ""]
    extras.append("+ residual" if operator.epilogue.has_residual else "")
    return " ".join([f"{h}×{w} {channels} → {operator.out_channels} {kh}×{kw}", *filter(None, extras)])


if __name__ == "__main__":
    main()
