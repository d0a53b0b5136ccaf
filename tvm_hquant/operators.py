"""What a layer computes, as plain data: shapes and attributes, no values and no precision.

Tensors are channels-last: activations ``[batch, height, width, channels]``, dense layers ``[rows, features]``.
Ceil-mode and automatic padding are resolved to explicit padding before an operator is described.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A sliding window. ``padding`` is (top, left, bottom, right), in elements of the input."""

    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the input that one position of the window spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))  # type: ignore[return-value]

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the output for an input of ``height`` × ``width``."""
        top, left, bottom, right = self.padding
        (eh, ew), (sh, sw) = self.extent, self.strides
        return (height + top + bottom - eh) // sh + 1, (width + left + right - ew) // sw + 1


@dataclass(frozen=True)
class Epilogue:
    """What follows the sums of an anchor: bias, then the addition of a residual tensor, then a clamp to [lower, upper]."""

    has_bias: bool = False
    has_residual: bool = False
    lower: float = -math.inf
    upper: float = math.inf


@dataclass(frozen=True)
class Conv2D:
    """Convolution, grouped and depthwise included. Weights ``[out_channels, in_channels / groups, kernel_h, kernel_w]``."""

    input_shape: Shape
    out_channels: int
    window: Window
    groups: int = 1
    epilogue: Epilogue = Epilogue()

    @property
    def in_channels(self) -> int:
        return self.input_shape[3]

    @property
    def output_shape(self) -> Shape:
        n, h, w, _ = self.input_shape
        return (n, *self.window.output_size(h, w), self.out_channels)

    @property
    def weight_shape(self) -> Shape:
        return (self.out_channels, self.in_channels // self.groups, *self.window.kernel)

    @property
    def is_depthwise(self) -> bool:
        """One input and one output channel per group."""
        return self.groups > 1 and self.groups == self.in_channels == self.out_channels

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return math.prod(self.output_shape) * math.prod(self.weight_shape[1:])


@dataclass(frozen=True)
class Dense:
    """``[rows, in_features] × weights [out_features, in_features]``; leading axes of the input are flattened to rows."""

    rows: int
    in_features: int
    out_features: int
    epilogue: Epilogue = Epilogue()
    leading_shape: Shape = ()
    """The leading axes before flattening, when there is not exactly one."""

    @property
    def input_shape(self) -> Shape:
        return (*(self.leading_shape or (self.rows,)), self.in_features)

    @property
    def output_shape(self) -> Shape:
        return (*(self.leading_shape or (self.rows,)), self.out_features)

    @property
    def weight_shape(self) -> Shape:
        return (self.out_features, self.in_features)

    @property
    def macs(self) -> int:
        return self.rows * self.in_features * self.out_features

    def as_conv2d(self) -> Conv2D:
        """The 1×1 convolution over ``rows`` pixels that computes the same."""
        return Conv2D((1, 1, self.rows, self.in_features), self.out_features, Window((1, 1)), 1, self.epilogue)


@dataclass(frozen=True)
class Add:
    """Sum of two tensors of one shape, then a clamp."""

    shape: Shape
    lower: float = -math.inf
    upper: float = math.inf

    @property
    def output_shape(self) -> Shape:
        return self.shape


@dataclass(frozen=True)
class Multiply:
    """Product of two tensors; one of size 1 along an axis, or without a leading axis, is repeated there."""

    input_shapes: tuple[Shape, Shape]

    @property
    def output_shape(self) -> Shape:
        a, b = self.input_shapes
        rank = max(len(a), len(b))
        padded = [(1,) * (rank - len(shape)) + shape for shape in (a, b)]
        return tuple(max(sizes) for sizes in zip(*padded, strict=True))


@dataclass(frozen=True)
class BiasAdd:
    """Sum of a tensor and constants, which are repeated along axes where they have size 1 or which they lack in front:
    embeddings of positions, biases and masks of attention."""

    shape: Shape
    bias_shape: Shape

    @property
    def output_shape(self) -> Shape:
        return self.shape


@dataclass(frozen=True)
class BatchMatmul:
    """Products of matrices that are activations both: scale · Σₖ a[…, i, k] · b[…, k, j].

    The matrices are seen through permutations, as in ``numpy.transpose``, so that attention needs no copies: input k in the
    order ``input_axes[k]`` is […, rows, depth] or […, depth, columns], and the product […, rows, columns] in the order
    ``output_axes`` is the output. A leading axis of size 1, or one that an input lacks, is repeated. ``scale`` is a float32
    value.
    """

    input_shapes: tuple[Shape, Shape]
    input_axes: tuple[Shape, Shape]
    output_axes: Shape
    scale: float = 1.0

    @property
    def operand_shapes(self) -> tuple[Shape, Shape]:
        """[…, rows, depth] and […, depth, columns], of one rank."""
        rank = max(len(shape) for shape in self.input_shapes)
        first, second = (
            (1,) * (rank - len(shape)) + tuple(shape[axis] for axis in axes)
            for shape, axes in zip(self.input_shapes, self.input_axes, strict=True)
        )
        return first, second

    @property
    def batch_shape(self) -> Shape:
        """The leading axes of the product."""
        return tuple(max(sizes) for sizes in zip(*(shape[:-2] for shape in self.operand_shapes), strict=True))

    @property
    def rows(self) -> int:
        return self.operand_shapes[0][-2]

    @property
    def depth(self) -> int:
        """Products of a sum."""
        return self.operand_shapes[0][-1]

    @property
    def columns(self) -> int:
        return self.operand_shapes[1][-1]

    @property
    def product_shape(self) -> Shape:
        return (*self.batch_shape, self.rows, self.columns)

    @property
    def output_shape(self) -> Shape:
        return tuple(self.product_shape[axis] for axis in self.output_axes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        return math.prod(self.product_shape) * self.depth


@dataclass(frozen=True)
class MaxPool2D:
    """Maximum over a window; padding takes no part."""

    input_shape: Shape
    window: Window

    @property
    def output_shape(self) -> Shape:
        n, h, w, c = self.input_shape
        return (n, *self.window.output_size(h, w), c)


@dataclass(frozen=True)
class AveragePool2D:
    """Mean over a window. ``counted_padding`` is the part of the padding that counts in the divisor."""

    input_shape: Shape
    window: Window
    counted_padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def output_shape(self) -> Shape:
        n, h, w, c = self.input_shape
        return (n, *self.window.output_size(h, w), c)

    @property
    def divisors(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Elements that count per output row and per output column; their product divides the sum."""

        def counts(size: int, out: int, axis: int) -> tuple[int, ...]:
            before, counted = self.window.padding[axis], self.counted_padding[axis]
            end = size + self.counted_padding[axis + 2]
            step, kernel, dilation = self.window.strides[axis], self.window.kernel[axis], self.window.dilation[axis]
            return tuple(
                max(1, sum(-counted <= o * step - before + k * dilation < end for k in range(kernel)))
                for o in range(out)
            )

        _, h, w, _ = self.input_shape
        _, oh, ow, _ = self.output_shape
        return counts(h, oh, 0), counts(w, ow, 1)


Positions = tuple[int, int, int]
"""(step, start, denominator): output i of an axis lies at (step · i + start) / denominator of the input."""


@dataclass(frozen=True)
class Resize2D:
    """Linear interpolation between the four nearest pixels; beyond the map its border repeats."""

    input_shape: Shape
    output_size: tuple[int, int]
    rows: Positions
    columns: Positions

    @property
    def output_shape(self) -> Shape:
        n, _, _, c = self.input_shape
        return (n, *self.output_size, c)


@dataclass(frozen=True)
class Concat:
    """Joins tensors along ``axis`` (not negative)."""

    input_shapes: tuple[Shape, ...]
    axis: int

    @property
    def output_shape(self) -> Shape:
        first = self.input_shapes[0]
        return (*first[: self.axis], sum(s[self.axis] for s in self.input_shapes), *first[self.axis + 1 :])


@dataclass(frozen=True)
class Step:
    """One operation of a :class:`Composition`.

    ``operands`` number the values it takes: 0 is the input of the composition, i > 0 the result of its i-th step, and
    i < 0 parameter −1 − i of the layer. The parameters of a function (the bounds of a clip) are the last operands.
    """

    function: str
    operands: tuple[int, ...]


@dataclass(frozen=True)
class Composition:
    """A function of one variable made of others (``numerics/functions.py`` lists them); the last step gives its value.

    Softsign, x / (|x| + 1), is ``(Step("abs", (0,)), Step("add", (1, -1)), Step("divide", (0, 2)))`` with parameter 1.
    """

    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Unary:
    """An elementwise function: clip (parameters lower, upper), leaky_relu (alpha), sigmoid, tanh, gelu, silu,
    hard_sigmoid (alpha, beta), hard_swish, elu (alpha), exp, abs, negative, floor, ceil, round…, or several composed."""

    shape: Shape
    function: str | Composition
    parameters: tuple[float, ...] = ()

    @property
    def output_shape(self) -> Shape:
        return self.shape

    @property
    def function_name(self) -> str:
        """What layers, kernels and messages call the function."""
        return self.function if isinstance(self.function, str) else "composition"


@dataclass(frozen=True)
class Movement:
    """Moves values without changing them. ``parameters`` of each function:

    - ``reshape``: none.
    - ``permute_dims``: the axes, as in ``numpy.transpose``.
    - ``strided_slice``: (axis, begin, stride) for each sliced axis, one after the other, begin not negative, stride
      positive; the length follows from the output shape.
    - ``take``: the axis, then the indices along it.
    - ``depth_to_space``: groups, rows and columns of a block, and rows and columns cut off in front. Channel
      ((g · rows + r) · columns + c) · depth + d of a pixel is channel g · depth + d of row r and column c of its block
      (ONNX's DCR has one group, CRD a depth of 1).
    - ``pad``: (before, after) for each axis, one after the other; ``fill`` is the real value put in (constant mode).
    """

    function: str
    input_shape: Shape
    output_shape: Shape
    parameters: tuple[int, ...] = ()
    fill: float = 0.0


@dataclass(frozen=True)
class Softmax:
    """exp(x − max) / Σ exp(x − max) along ``axis`` (not negative)."""

    shape: Shape
    axis: int

    @property
    def output_shape(self) -> Shape:
        return self.shape


@dataclass(frozen=True)
class LocalResponseNormalization:
    """x / (bias + alpha / size · Σ x²)^beta, the sum over ``size`` neighbouring channels (the last axis).

    Channel c sums over c − ⌊(size−1)/2⌋ … c + ⌈(size−1)/2⌉, as far as those exist, as ONNX has it.
    """

    shape: Shape
    size: int
    alpha: float
    beta: float
    bias: float

    @property
    def output_shape(self) -> Shape:
        return self.shape


@dataclass(frozen=True)
class GroupNormalization:
    """(x − mean) / √(variance + epsilon) · gamma + beta, mean and variance of each group of channels.

    Axes before ``axis`` are kept apart. Those from ``channel_axis`` on are the channels, each with a gamma and a beta, in
    ``groups`` groups of neighbours; a group is taken over all positions, which are the axes in between. Layer normalization
    over trailing axes has no positions and one group, instance normalization a group for each channel.
    """

    shape: Shape
    axis: int
    channel_axis: int
    epsilon: float
    groups: int = 1

    @property
    def output_shape(self) -> Shape:
        return self.shape

    @property
    def outer(self) -> int:
        """What is kept apart besides groups."""
        return math.prod(self.shape[: self.axis])

    @property
    def positions(self) -> int:
        return math.prod(self.shape[self.axis : self.channel_axis])

    @property
    def channels(self) -> int:
        return math.prod(self.shape[self.channel_axis :])

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups


@dataclass(frozen=True)
class Opaque:
    """Anything else: computed in float32 by TVM's own legalization. ``name`` is the Relax operator, ``macs`` are its
    multiply-accumulates of one call where it is a product of matrices (a 3D convolution, say)."""

    name: str
    input_shapes: tuple[Shape, ...]
    output_shape: Shape
    macs: int = 0


@dataclass(frozen=True)
class Convert:
    """A change of format between two layers: quantize, dequantize, requantize, or a cast between floats."""

    shape: Shape

    @property
    def output_shape(self) -> Shape:
        return self.shape


Anchor = Conv2D | Dense
Operator = (
    Conv2D | Dense | Add | BiasAdd | Multiply | BatchMatmul | MaxPool2D | AveragePool2D | Resize2D | Concat | Unary | Movement
    | Softmax | LocalResponseNormalization | GroupNormalization | Opaque | Convert
)  # fmt: skip
