"""The loop over the elements of a layer whose output has one for each of every input, wherever these lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm_hquant.kernels.interface import KernelRequest
from tvm_hquant.kernels.kernel_function import input_place
from tvm_hquant.kernels.primitives import Expression
from tvm_hquant.kernels.processor import Processor, Work
from tvm_hquant.kernels.vector_loops import elements, fitting_lanes, flat_loop, row_loop, vector_loop


def neighbours(request: KernelRequest) -> int:
    """Elements of the output that lie side by side in all tensors: all of them, or the channels of a pixel where those of an
    input lie in a wider buffer."""
    shape = request.operator.output_shape
    return shape[-1] if request.sources else elements(shape)


@contextmanager
def element_loop(
    request: KernelRequest, width: int, work: Work, processor: Processor
) -> Iterator[tuple[Sequence[Expression], Expression]]:
    """Goes over vectors of ``width`` elements; where they start in each input and in the output, flat.

    ``width`` must not exceed :func:`neighbours`; only where it does not divide that, some elements are come to more than once.
    """
    count, run = len(request.inputs), neighbours(request)
    if not request.sources:
        with flat_loop(run, width, work, processor) as start:
            yield [start] * count, start
        return
    places = [input_place(request, number) for number in range(count)]
    with (
        row_loop(elements(request.operator.output_shape) // run, work, processor) as row,
        vector_loop(run, width) as at,
    ):
        yield [row * place.channels + (at + place.offset) for place in places], row * run + at


def fitting_width(request: KernelRequest, lanes: int) -> int:
    """So many lanes, or fewer where fewer elements lie side by side."""
    return fitting_lanes(neighbours(request), lanes)
