"""Random layers without weights, and what runs a kernel: shared by the tests of the common and the reference family."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import tvm
from hypothesis import strategies as st

from tvm_hquant import numerics
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.kernels.interface import (
    Array,
    BiasConstants,
    DequantizeConstants,
    FillConstants,
    FloatElementwiseConstants,
    IntegerElementwiseConstants,
    Kernel,
    KernelRequest,
    LayerConstants,
    NoConstants,
    NormalizationConstants,
    QuantizeConstants,
    Requantization,
    TableConstants,
)
from tvm_hquant.kernels.kernel_function import activation_types, input_place, input_shapes
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    BiasAdd,
    Composition,
    Concat,
    Convert,
    GroupNormalization,
    LocalResponseNormalization,
    MaxPool2D,
    Movement,
    Multiply,
    Resize2D,
    Softmax,
    Step,
    Unary,
    Window,
)
from tvm_hquant.relax_ir.describe import resize_positions
from tvm_hquant.tensor_format import STORAGE_DTYPE

CODES = ("uint8", "uint16")
FLOATS = ("float32", "float16", "bfloat16")
STORAGES = CODES + FLOATS


@dataclass(frozen=True)
class Case:
    """A request with constants and a seed for the inputs."""

    request: KernelRequest
    constants: LayerConstants
    seed: int

    def inputs(self) -> list[Array]:
        rng = np.random.default_rng(self.seed)
        shapes = input_shapes(self.request.operator)
        return [stored_values(rng, s, kind) for s, kind in zip(shapes, self.request.inputs, strict=True)]

    def buffers(self) -> list[Array]:
        """What the kernel gets for them: where they lie in wider buffers, there are other values around them."""
        rng, inputs = np.random.default_rng(self.seed + 1), self.inputs()
        types = zip(activation_types(self.request), self.request.inputs, strict=True)
        buffers = [stored_values(rng, shape, kind) for (shape, _), kind in types]
        for number, values in enumerate(inputs):
            first = input_place(self.request, number).offset
            buffers[number][..., first : first + values.shape[-1]] = values
        return buffers


def stored_values(rng: np.random.Generator, shape: tuple[int, ...], storage: str) -> Array:
    """Random stored values; floats of many magnitudes, a few of them infinite, NaN, denormal or −0."""
    if storage in CODES:
        return rng.integers(0, np.iinfo(storage).max, shape, endpoint=True).astype(storage)
    values = (rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 1.5, shape)).astype(np.float32)
    special = np.array([np.inf, -np.inf, np.nan, 1e-41, -1e-41, -0.0, 88.6, -103.5, 3.4e38], np.float32)
    where = rng.random(shape) < 0.02
    return numerics.narrow(np.where(where, rng.choice(special, shape), values).astype(np.float32), storage)


def run_kernel(kernel: Kernel, case: Case, target: dict[str, str]) -> Array:
    """Compiles a kernel and calls it once."""
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    library = tvm.compile(module, target=tvm.target.Target(target), tir_pipeline=CPU_PIPELINE)
    request = case.request
    # What the kernel leaves unwritten shows.
    output = tvm.runtime.tensor(np.full(request.operator.output_shape, 77, STORAGE_DTYPE[request.output]))
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(a)) for a in (*case.buffers(), *kernel.pack(case.constants))]
    library["kernel"](*arguments, output)
    return output.numpy()


def assert_same_bits(got: Array, want: Array, case: Case) -> None:
    """Equality of every bit; a NaN may be any NaN."""
    assert got.dtype == want.dtype
    if case.request.output in FLOATS:
        got, want = (numerics.widen(a, case.request.output) for a in (got, want))
        nan = np.isnan(want)
        np.testing.assert_array_equal(np.isnan(got), nan, str(case.request))
        got, want = (np.where(nan, np.float32(0), a).view(np.uint32) for a in (got, want))
    np.testing.assert_array_equal(got, want, str(case.request))


def assert_matches_contract(kernel: Kernel | None, case: Case, target: dict[str, str]) -> None:
    """The kernel gives the bits of ``numerics.evaluate``."""
    assert kernel is not None
    want = numerics.evaluate(case.request, case.constants, case.inputs())
    assert_same_bits(run_kernel(kernel, case, target), want, case)


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).flatmap(
    lambda outer: st.integers(1, 70).map(lambda channels: (*outer, channels))
)
seeds = st.integers(0, 2**32 - 1)


def requantization(storage: str, rng: np.random.Generator) -> Requantization:
    """Bounds that cut some values off, with codes on both sides of the zero point."""
    if storage not in CODES:
        return Requantization(-float(np.float32(rng.uniform(1, 50))), float(np.float32(rng.uniform(50, 1e6))), 0)
    top = int(np.iinfo(storage).max)
    zero_point = int(rng.integers(0, top, endpoint=True))
    lower, upper = sorted(int(v) for v in rng.integers(-zero_point, top - zero_point, 2, endpoint=True))
    return Requantization(float(lower), float(upper), zero_point)


def elementwise_constants(request: KernelRequest, rng: np.random.Generator) -> IntegerElementwiseConstants:
    out = {"uint8": 200.0, "uint16": 50000.0}.get(request.output, 300.0)
    return IntegerElementwiseConstants(
        tuple(int(rng.integers(0, np.iinfo(storage).max)) for storage in request.inputs),
        tuple(np.float32(rng.uniform(0.2, 1) * out / np.iinfo(storage).max) for storage in request.inputs),
        requantization(request.output, rng),
    )


@st.composite
def products(draw: st.DrawFn) -> Case:
    """Tensors of one shape, and every way of repeating one or both along axes."""
    shape, seed = draw(shapes), draw(seeds)
    rng = np.random.default_rng(seed)
    left, right = (tuple(size if draw(st.booleans()) else 1 for size in shape) for _ in range(2))
    operator = Multiply((draw(st.sampled_from([left, shape])), right[draw(st.integers(0, len(shape) - 1)) :]))
    if draw(st.booleans()):
        inputs = draw(st.tuples(st.sampled_from(CODES), st.sampled_from(CODES)))
        request = KernelRequest(operator, inputs, draw(st.sampled_from(STORAGES)))
        constants = elementwise_constants(request, rng)
        factors = np.float32(math.prod(float(m) for m in constants.multipliers))
        return Case(request, replace(constants, multipliers=(factors,)), seed)
    floats = draw(st.tuples(*[st.sampled_from(FLOATS)] * 2))
    return Case(KernelRequest(operator, floats, draw(st.sampled_from(FLOATS))), NoConstants(), seed)


@st.composite
def matmul_operators(draw: st.DrawFn) -> BatchMatmul:
    """Every order of axes, leading axes that are repeated or missing, and sizes around those of tiles and vectors."""
    leading = draw(st.lists(st.integers(1, 3), min_size=1, max_size=2))
    rows, depth, columns = draw(st.integers(1, 20)), draw(st.integers(1, 41)), draw(st.integers(1, 41))
    second = [size if draw(st.booleans()) else 1 for size in leading][draw(st.integers(0, len(leading))) :]
    shapes, orders = [], []
    for operand in ((*leading, rows, depth), (*second, depth, columns)):
        order = tuple(range(len(operand)))
        kind = draw(st.sampled_from(["as stored", "transposed", "any order"]))
        if kind == "transposed":
            order = (*order[:-2], order[-1], order[-2])
        elif kind == "any order":
            order = tuple(draw(st.permutations(order)))
        shapes.append(tuple(operand[order.index(axis)] for axis in range(len(order))))
        orders.append(order)
    output = tuple(draw(st.permutations(range(len(leading) + 2)))) if draw(st.booleans()) else range(len(leading) + 2)
    scale = draw(st.sampled_from([1.0, 0.125, float(np.float32(0.37))]))
    return BatchMatmul((shapes[0], shapes[1]), (orders[0], orders[1]), tuple(output), scale)


@st.composite
def matmuls(draw: st.DrawFn, operators: st.SearchStrategy[BatchMatmul] | None = None) -> Case:
    """Products of matrices of codes, the second ones symmetric int8, and of floats."""
    operator, seed = draw(operators or matmul_operators()), draw(seeds)
    rng = np.random.default_rng(seed)
    if draw(st.booleans()):
        request = KernelRequest(operator, ("uint8", "uint8"), draw(st.sampled_from(STORAGES)))
        base = elementwise_constants(request, rng)
        factor = np.float32(float(base.multipliers[0]) / 64 / math.sqrt(operator.depth))
        zero_points = (base.input_zero_points[0], 128)
        return Case(request, replace(base, multipliers=(factor,), input_zero_points=zero_points), seed)
    storage = draw(st.sampled_from(FLOATS))
    return Case(KernelRequest(operator, (storage, storage), draw(st.sampled_from(FLOATS))), NoConstants(), seed)


@st.composite
def additions(draw: st.DrawFn) -> Case:
    shape, seed = draw(shapes), draw(seeds)
    rng = np.random.default_rng(seed)
    if draw(st.booleans()):
        inputs = draw(st.tuples(st.sampled_from(CODES), st.sampled_from(CODES)))
        request = KernelRequest(Add(shape), inputs, draw(st.sampled_from(STORAGES)))
        return Case(request, elementwise_constants(request, rng), seed)
    bounds = (-1.0, 6.0)
    request = KernelRequest(
        Add(shape, *bounds), draw(st.tuples(*[st.sampled_from(FLOATS)] * 2)), draw(st.sampled_from(FLOATS))
    )
    return Case(request, FloatElementwiseConstants(bounds), seed)


@st.composite
def conversions(draw: st.DrawFn) -> Case:
    shape, seed = draw(shapes), draw(seeds)
    rng = np.random.default_rng(seed)
    request = KernelRequest(Convert(shape), (draw(st.sampled_from(STORAGES)),), draw(st.sampled_from(STORAGES)))
    source, output = request.inputs[0], request.output
    constants: LayerConstants
    if source in CODES and output in CODES:
        constants = elementwise_constants(request, rng)
    elif source in CODES:
        constants = DequantizeConstants(float(np.float32(rng.uniform(0.001, 0.1))), int(rng.integers(0, 256)))
    elif output in CODES:
        constants = QuantizeConstants(float(np.float32(rng.uniform(0.001, 0.1))), requantization(output, rng))
    else:
        constants = NoConstants()
    return Case(request, constants, seed)


COMPOSITION = Composition((
    Step("greater", (0, -1)), Step("where", (1, 0, -2)), Step("abs", (2,)), Step("add", (3, -1)), Step("log", (4,)),
    Step("clip", (5, -3, -1)), Step("maximum", (6, 0)), Step("divide", (7, 4)), Step("minimum", (8, 5)),
    Step("subtract", (-2, 9)), Step("multiply", (10, 0)), Step("tanh", (11,)),
))  # fmt: skip
"""All operations that only compositions have, and functions with and without parameters, of three parameters."""


def unary_case(function: str | Composition, shape: tuple[int, ...], source: str, output: str, seed: int) -> Case:
    rng = np.random.default_rng(seed)
    count = numerics.PARAMETER_COUNTS[function] if isinstance(function, str) else 3
    parameters = tuple(float(np.float32(v)) for v in sorted(rng.uniform(-0.5, 1.5, count)))
    request = KernelRequest(Unary(shape, function, parameters), (source,), output)  # type: ignore[arg-type]
    if source == "uint8":
        return Case(request, TableConstants(stored_values(rng, (256,), output)), seed)
    if source == "uint16":
        return Case(request, elementwise_constants(request, rng), seed)
    return Case(request, FloatElementwiseConstants(parameters), seed)


@st.composite
def code_unaries(draw: st.DrawFn) -> Case:
    source, output = draw(st.sampled_from(CODES)), draw(st.sampled_from(STORAGES))
    return unary_case("clip" if source == "uint16" else "silu", draw(shapes), source, output, draw(seeds))


@st.composite
def windows(draw: st.DrawFn, height: int, width: int) -> Window:
    def axis(size: int) -> tuple[int, int, int, int, int]:
        dilation = draw(st.integers(1, 2))
        kernel = draw(st.integers(1, min(4, (size - 1) // dilation + 1)))
        margin = st.integers(0, (kernel - 1) * dilation)
        return kernel, draw(st.integers(1, 3)), draw(margin), draw(margin), dilation

    rows, columns = axis(height), axis(width)
    kernel, strides, before, after, dilation = zip(rows, columns, strict=True)
    return Window(kernel, strides, (*before, *after), dilation)


@st.composite
def pools(draw: st.DrawFn) -> Case:
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 11), st.integers(1, 11), st.integers(1, 70)))
    window, seed, storage = draw(windows(shape[1], shape[2])), draw(seeds), draw(st.sampled_from(STORAGES))
    rng = np.random.default_rng(seed)
    if draw(st.booleans()):
        return Case(KernelRequest(MaxPool2D(shape, window), (storage,), storage), NoConstants(), seed)
    counted = draw(st.sampled_from([(0, 0, 0, 0), window.padding]))
    operator = AveragePool2D(shape, window, counted)
    if storage in FLOATS:
        return Case(KernelRequest(operator, (storage,), draw(st.sampled_from(FLOATS))), NoConstants(), seed)
    request = KernelRequest(operator, (storage,), draw(st.sampled_from(STORAGES)))
    base = elementwise_constants(request, rng)
    multiplier = (base.multipliers[0] / np.multiply.outer(*map(np.array, operator.divisors))).astype(np.float32)
    constants = IntegerElementwiseConstants(base.input_zero_points, (multiplier,), base.requantization)
    return Case(request, constants, seed)


@st.composite
def resizes(draw: st.DrawFn) -> Case:
    shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 7), st.integers(1, 70)))
    size = draw(st.tuples(st.integers(1, 13), st.integers(1, 13)))
    modes = st.sampled_from(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
    rows, columns = (resize_positions(draw(modes), shape[axis + 1], size[axis]) for axis in (0, 1))
    assert rows is not None
    assert columns is not None
    operator, seed, storage = Resize2D(shape, size, rows, columns), draw(seeds), draw(st.sampled_from(STORAGES))
    if storage in FLOATS:
        return Case(KernelRequest(operator, (storage,), draw(st.sampled_from(FLOATS))), NoConstants(), seed)
    request = KernelRequest(operator, (storage,), draw(st.sampled_from(STORAGES)))
    return Case(request, elementwise_constants(request, np.random.default_rng(seed)), seed)


@st.composite
def concats(draw: st.DrawFn) -> Case:
    shape, storage = draw(shapes), draw(st.sampled_from(STORAGES))
    axis = draw(st.integers(0, len(shape) - 1))
    sizes = draw(st.lists(st.integers(1, 40), min_size=2, max_size=4))
    parts = tuple((*shape[:axis], size, *shape[axis + 1 :]) for size in sizes)
    return Case(KernelRequest(Concat(parts, axis), (storage,) * len(sizes), storage), NoConstants(), draw(seeds))


@st.composite
def _movement_operators(draw: st.DrawFn) -> Movement:
    shape = draw(shapes)
    rank = len(shape)
    name = draw(st.sampled_from(["reshape", "permute_dims", "strided_slice", "take", "shuffle", "pad", "pixels"]))
    if name == "pixels":
        return draw(_depth_to_space_operators())
    if name == "reshape":
        return Movement(name, shape, (math.prod(shape[:-1]), 1, shape[-1]))
    if name == "permute_dims":
        axes = tuple(draw(st.permutations(range(rank))))
        return Movement(name, shape, tuple(shape[axis] for axis in axes), axes)
    if name == "strided_slice":
        output, parameters = list(shape), []
        for axis in draw(st.sets(st.integers(0, rank - 1), min_size=1)):
            begin, stride = draw(st.integers(0, shape[axis] - 1)), draw(st.integers(1, 3))
            output[axis] = draw(st.integers(1, (shape[axis] - 1 - begin) // stride + 1))
            parameters += [axis, begin, stride]
        return Movement(name, shape, tuple(output), tuple(parameters))
    if name == "pad":
        widths = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=rank, max_size=rank))
        output = [size + sum(width) for size, width in zip(shape, widths, strict=True)]
        return Movement(name, shape, tuple(output), tuple(n for width in widths for n in width), fill=7.0)
    if name == "shuffle":
        groups, length = draw(st.integers(2, 5)), draw(st.integers(1, 20))
        indices = [g * length + i for i in range(length) for g in range(groups)]
        axis, shape = rank - 1, (*shape[:-1], groups * length)
    else:
        axis = draw(st.integers(0, rank - 1))
        indices = draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=12))
    output = [*shape[:axis], len(indices), *shape[axis + 1 :]]
    return Movement("take", shape, tuple(output), (axis, *indices))


@st.composite
def _depth_to_space_operators(draw: st.DrawFn) -> Movement:
    """Blocks of up to 3×3 pixels, of all channels or of groups of them, whole or cut."""
    batch, height, width, groups, depth = (draw(st.integers(1, most)) for most in (2, 4, 5, 3, 20))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    top, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
    out_height = draw(st.integers(1, height * rows - top))
    out_width = draw(st.one_of(st.just(width * columns - left), st.integers(1, width * columns - left)))
    shape = (batch, height, width, groups * rows * columns * depth)
    output = (batch, out_height, out_width, groups * depth)
    return Movement("depth_to_space", shape, output, (groups, rows, columns, top, left))


@st.composite
def movements(draw: st.DrawFn) -> Case:
    operator, storage = draw(_movement_operators()), draw(st.sampled_from(STORAGES))
    constants: LayerConstants = NoConstants()
    if operator.function == "pad":
        constants = FillConstants(draw(st.sampled_from([0.0, 3.0, 255.0])) if storage in CODES else -1.37)
    return Case(KernelRequest(operator, (storage,), storage), constants, draw(seeds))


@st.composite
def normalizations(draw: st.DrawFn) -> Case:
    shape, source, output = draw(shapes), draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    operator: Softmax | LocalResponseNormalization
    if draw(st.booleans()):
        operator, output = Softmax(shape, draw(st.integers(0, len(shape) - 1))), draw(st.sampled_from(STORAGES))
        seed = draw(seeds)
        constants = quantization(output, np.random.default_rng(seed)) if output in CODES else NoConstants()
        return Case(KernelRequest(operator, (source,), output), constants, seed)
    operator = LocalResponseNormalization(
        shape,
        draw(st.integers(1, 7)),
        draw(st.sampled_from([0.02, 0.0, -0.01])),
        draw(st.sampled_from([0.75, 0.5, -0.75, 1.7])),
        draw(st.sampled_from([1.0, 2.0, 1e-30, 0.0])),
    )
    return Case(KernelRequest(operator, (source,), output), NoConstants(), draw(seeds))


def quantization(storage: str, rng: np.random.Generator) -> QuantizeConstants:
    """A scale of a size that makes many codes of normal numbers."""
    return QuantizeConstants(float(np.float32(rng.uniform(0.01, 0.05))), requantization(storage, rng))


@st.composite
def group_normalizations(draw: st.DrawFn) -> Case:
    """Rows, groups of positions and single channels, of lengths on both sides of 16 and of a vector."""
    source, output, seed = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(STORAGES)), draw(seeds)
    groups, per_group = draw(st.integers(1, 5)), draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))
    outer = draw(st.lists(st.integers(1, 5), max_size=2))
    positions = draw(st.lists(st.integers(1, 6), max_size=2))
    channels = draw(st.sampled_from([[groups * per_group], [groups, per_group]]))
    shape = (*outer, *positions, *channels)
    epsilon = draw(st.sampled_from([1e-5, 1e-12, 0.1]))
    operator = GroupNormalization(shape, len(outer), len(outer) + len(positions), epsilon, groups)
    rng = np.random.default_rng(seed)
    gamma, beta = (rng.normal(size=operator.channels).astype(np.float32) for _ in range(2))
    codes = quantization(output, rng) if output in CODES else None
    return Case(KernelRequest(operator, (source,), output), NormalizationConstants(gamma, beta, codes), seed)


@st.composite
def bias_additions(draw: st.DrawFn) -> Case:
    """Constants of the whole shape, of trailing axes, of axes in the middle, or one number."""
    shape, source, output, seed = (
        draw(shapes),
        draw(st.sampled_from(FLOATS)),
        draw(st.sampled_from(STORAGES)),
        draw(seeds),
    )
    own = tuple(size if draw(st.booleans()) else 1 for size in shape)[draw(st.integers(0, len(shape) - 1)) :]
    rng = np.random.default_rng(seed)
    codes = quantization(output, rng) if output in CODES else None
    constants = BiasConstants(rng.normal(size=own).astype(np.float32), codes)
    return Case(KernelRequest(BiasAdd(shape, own), (source,), output), constants, seed)


ALL_KINDS = {
    "additions": additions(),
    "bias additions": bias_additions(),
    "products": products(),
    "conversions": conversions(),
    "unary functions of codes": code_unaries(),
    "pools": pools(),
    "resizes": resizes(),
    "concats": concats(),
    "movements": movements(),
    "normalizations": normalizations(),
    "group normalizations": group_normalizations(),
}
"""Random layers of every kind without weights."""
