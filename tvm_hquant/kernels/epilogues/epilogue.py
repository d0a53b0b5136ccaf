"""The end of an anchor's kernel, vector by vector: multiplier, residual, clamp, rounding, store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script import builder as T

from tvm_hquant.kernels.epilogues.turns import Turns
from tvm_hquant.kernels.interface import FloatAnchorConstants, IntegerAnchorConstants, KernelRequest
from tvm_hquant.kernels.kernel_function import Buffer
from tvm_hquant.kernels.primitives import (
    STACK,
    Expression,
    LlvmPrimitives,
    broadcast,
    centred,
    clamp,
    convert,
    narrow,
    requantize,
    widen,
)
from tvm_hquant.kernels.vector_loops import load, store
from tvm_hquant.tensor_format import STORAGE_DTYPE

LIMIT_COUNT = 3
"""float32 [lower, upper, residual multiplier]."""


@dataclass(frozen=True)
class Epilogue:
    """Finishes vectors of ``lanes`` channels, of which the first ``valid`` exist.

    ``limits`` is float32 [lower, upper, residual multiplier]; ``zero_points`` int32 [output, residual], unused in float.
    ``turns`` is what outputs are stored in turns with, if anything.
    """

    request: KernelRequest
    lanes: int
    valid: int
    residual: Buffer | None
    limits: Buffer
    zero_points: Buffer | None
    output: Buffer
    turns: Turns | None = None

    @property
    def is_integer(self) -> bool:
        return self.zero_points is not None

    @property
    def memory(self) -> Sequence[Buffer]:
        """What :meth:`finish` reads and writes at the index."""
        is_apart = self.residual is not None and self.request.overwritten is None
        return (self.residual, self.output) if is_apart else (self.output,)

    def finish(
        self,
        value: Expression,
        index: Expression,
        residual: Expression | None = None,
        other: Expression | None = None,
    ) -> None:
        """Adds the residual to float32 ``value``, clamps, rounds and stores at the flat ``index`` of the output.

        ``residual`` is where the residual is, if not at that index; ``other`` where the channels are that are stored in turns
        with these.
        """
        p = LlvmPrimitives()
        if self.residual is not None:
            stored = self._load(self.residual, index if residual is None else residual)
            if self.is_integer:
                assert self.zero_points is not None
                difference = convert(centred(stored, self.zero_points[1]), "float32")
                value = p.fma(difference, broadcast(self.limits[2], self.lanes), value)
            else:
                value = value + widen(stored, self.request.inputs[-1])
        if self.zero_points is not None and self.request.output in ("uint8", "uint16"):
            result = requantize(p, value, self.limits[0], self.limits[1], self.zero_points[0], self.request.output)
        else:
            clamped = clamp(p, value, self.limits[0], self.limits[1])
            result = narrow(p, clamped, self.request.output, may_be_nan=False)
        if self.turns is None:
            self._store(result, index)
            return
        assert other is not None
        pairs = self.turns.pairs(T.bind(result), T.bind(self._load(self.turns.other, other)))
        self._store(pairs, index, 2)

    def _load(self, buffer: Buffer, index: Expression) -> Expression:
        if self.valid == self.lanes:
            return load(buffer, index, self.lanes)
        # What lies behind the last channel belongs to others, or to nobody.
        part = T.alloc_buffer((self.lanes,), buffer.dtype, scope=STACK)
        store(part, 0, broadcast(T.Cast(str(buffer.dtype), T.int32(0)), self.lanes), self.lanes)
        with T.serial(self.valid) as lane:
            T.buffer_store(part, buffer[index + lane], [lane])
        return T.bind(load(part, 0, self.lanes))

    def _store(self, value: Expression, index: Expression, tensors: int = 1) -> None:
        """Stores the channels of one tensor, or of two in turns."""
        lanes = tensors * self.lanes
        if self.valid == self.lanes:
            store(self.output, index, value, lanes)
            return
        part = T.alloc_buffer((lanes,), STORAGE_DTYPE[self.request.output], scope=STACK)
        store(part, 0, value, lanes)
        with T.serial(tensors * self.valid) as lane:
            T.buffer_store(self.output, part[lane], [index + lane])


def limits_of(constants: IntegerAnchorConstants | FloatAnchorConstants) -> Sequence[float]:
    """[lower, upper, residual multiplier]."""
    if isinstance(constants, IntegerAnchorConstants):
        r = constants.requantization
        return r.lower, r.upper, constants.residual_multiplier
    return constants.lower, constants.upper, 0.0


def scale_accumulator(accumulator: Expression, multiplier: Expression, value: Expression) -> Expression:
    """fma(float32(accumulator), multiplier, value)."""
    return LlvmPrimitives().fma(convert(accumulator, "float32"), multiplier, value)
