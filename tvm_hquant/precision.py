"""The precisions a layer can have, by the names used everywhere: code, command line, plans, reports.

====================  =========================  ====================================================
name                  activations                weights
====================  =========================  ====================================================
``a8w8`` (``uint8``)  uint8 codes, asymmetric    int8, per output channel
``int8``              int8 codes, zero point 0   int8, per output channel
``a8w7`` … ``a8w2``   uint8 codes, asymmetric    narrower codes in the same int8 kernels
``a16w8``             uint16 codes, two passes   int8
``a16w16``            uint16 codes, two passes   two 8-bit points (multipoint quantization, Liu et al. 2021)
``a8w4x1.5``, …       uint8 (uint16) codes       sums of points of 2 to 8 bits, 1.5 terms per output channel on
                                                 average, at most two; up to ``x8``
``float16``           float16 storage            float16 storage, float32 accumulators
``bfloat16``          bfloat16 storage           bfloat16 storage, float32 accumulators
``float32``           float32                    float32
``w8`` … ``w2``       float32                    integer codes, made float32 again at compile time
``bfloat16w4``, …     bfloat16 (float16) storage integer codes of 2 to 8 bits, made bfloat16 (float16) again
====================  =========================  ====================================================

Any other pair ``a{2…16}w{2…16}`` runs in the kernels of a wider one (:attr:`Precision.carrier`), ``a6w6`` in those of ``a8w6``,
``a12w4`` in those of ``a16w8``: codes are narrower, and weights take their own bits in the file. Weights of 9 to 16 bits are
two points that share the bits, as those of ``a16w16`` do: ``a12w12`` has two of 6 bits, ``a8w9`` one of 5 and one of 4.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from tvm_hquant.errors import PrecisionError


class Arithmetic(StrEnum):
    """How a layer computes."""

    INTEGER = "integer"
    FLOAT = "float"
    WEIGHT_ONLY = "weight-only"


@dataclass(frozen=True, order=True)
class Precision:
    """One precision of a layer.

    ``activation_bits`` and ``weight_bits`` count the bits of a value. ``weight_points`` is the number of weight tensors whose
    scaled sum stands for the weights, and ``point_bits`` the bits of the first of them (:attr:`point_widths`); ``terms`` is
    their mean number over output channels where that is a knob, those that have fewer having zero codes in the others.
    ``symmetric`` says that activation codes are int8 with zero point 0.
    """

    name: str
    arithmetic: Arithmetic
    activation_bits: int
    weight_bits: int
    symmetric: bool = False
    weight_points: int = 1
    point_bits: int = 8
    terms: float = 1.0

    def __str__(self) -> str:
        return self.name

    @property
    def is_integer(self) -> bool:
        """Whether activations are integer codes."""
        return self.arithmetic is Arithmetic.INTEGER

    @property
    def computed(self) -> Precision:
        """What a layer computes in whose weights are stored in fewer bits: ``bfloat16`` for ``bfloat16w4``; others themselves.

        Plans hold the two apart, as precision and ``stored_bits``.
        """
        if self.arithmetic is not Arithmetic.WEIGHT_ONLY or self.activation_bits == 32:
            return self
        return FLOAT16 if self.name.startswith(FLOAT16.name) else BFLOAT16

    @property
    def carrier(self) -> Precision:
        """The precision in whose kernels this one runs, and at whose speed: ``a8w6`` for ``a6w6``; others themselves.

        Limits of codes are arguments of kernels, so narrower codes are nothing but other limits.
        """
        if not self.is_integer or self.symmetric:
            return self
        bits = 8 if self.activation_bits <= 8 else 16
        if self.is_multipoint:
            return _multipoint(bits, self.point_bits, self.terms)
        narrow = bits == 16 and self.weight_bits <= 8
        return A16W8 if narrow else parse_precision(f"a{bits}w{self.weight_bits}")

    @property
    def point_widths(self) -> tuple[int, ...]:
        """Bits of each weight tensor of the sum."""
        if self.is_multipoint:
            return (self.point_bits,) * self.weight_points
        return (self.point_bits, self.weight_bits - self.point_bits) if self.weight_points == 2 else (self.weight_bits,)

    @property
    def needs_calibration(self) -> bool:
        """Whether ranges of activations must be known."""
        return self.is_integer

    def with_stored_weights(self, bits: int | None) -> Precision:
        """The precision whose weight codes a layer has that computes in this one and stores its weights in ``bits`` bits.

        A float layer has those of weight-only ``w{bits}``, an integer layer those of the same activations with narrower
        weights. None gives the precision itself, or what the name says of the weights.

        Raises:
            PrecisionError: weights of this precision cannot be stored in so many bits.
        """
        if bits is None:
            return self if self.computed == self else parse_precision(f"w{self.weight_bits}")
        most = min(8, self.weight_bits)
        if not 2 <= bits <= most:
            raise PrecisionError(f"weights of {self.name} cannot be stored in {bits} bits: use 2 to {most}")
        return parse_precision(f"a{self.activation_bits}w{bits}" if self.is_integer else f"w{bits}")

    @property
    def is_multipoint(self) -> bool:
        """Whether the mean number of weight points is a knob, and output channels have numbers of their own."""
        return self.terms > 1


def _integer(name: str, activation_bits: int, weight_bits: int) -> Precision:
    if weight_bits <= 8:
        return Precision(name, Arithmetic.INTEGER, activation_bits, weight_bits)
    first = (weight_bits + 1) // 2
    return Precision(name, Arithmetic.INTEGER, activation_bits, weight_bits, weight_points=2, point_bits=first)


def _multipoint(activation_bits: int, point_bits: int, terms: float) -> Precision:
    if terms == 1:
        return parse_precision(f"a{activation_bits}w{point_bits}")
    name, bits = f"a{activation_bits}w{point_bits}x{terms:g}", math.ceil(point_bits * terms)
    return Precision(name, Arithmetic.INTEGER, activation_bits, bits, False, math.ceil(terms), point_bits, terms)


FLOAT32 = Precision("float32", Arithmetic.FLOAT, 32, 32)
FLOAT16 = Precision("float16", Arithmetic.FLOAT, 16, 16)
BFLOAT16 = Precision("bfloat16", Arithmetic.FLOAT, 16, 16)
A8W8 = _integer("a8w8", 8, 8)
INT8 = Precision("int8", Arithmetic.INTEGER, 8, 8, symmetric=True)
A16W8 = _integer("a16w8", 16, 8)
A16W16 = _integer("a16w16", 16, 16)

ALIASES = {"uint8": "a8w8", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}

_NAMED = {p.name: p for p in (FLOAT32, FLOAT16, BFLOAT16, A8W8, INT8, A16W8, A16W16)}
REALIZED: tuple[str, ...] = (
    "a8w8", "int8", *(f"a8w{b}" for b in range(7, 1, -1)), "a16w8", "a16w16",
    "float16", "bfloat16", "float32", *(f"w{b}" for b in range(8, 1, -1)),
)  # fmt: skip
"""Names of the precisions that target specs offer and lists show, in that order; others run in the kernels of these."""

_PAIR = re.compile(r"a(\d{1,2})w(\d{1,2})")
_MULTIPOINT = re.compile(r"a(\d{1,2})w([2-8])x(\d(?:\.\d{1,2})?)")
_WEIGHT_ONLY = re.compile(r"w([2-8])")
_STORED_FLOAT = re.compile(r"b?float16w([2-8])")


@cache
def parse_precision(name: str) -> Precision:
    """The precision called ``name``.

    Raises:
        PrecisionError: no precision has that name.
    """
    canonical = ALIASES.get(name.lower(), name.lower())
    if canonical in _NAMED:
        return _NAMED[canonical]
    if match := _WEIGHT_ONLY.fullmatch(canonical):
        return Precision(canonical, Arithmetic.WEIGHT_ONLY, 32, int(match[1]))
    if match := _STORED_FLOAT.fullmatch(canonical):
        return Precision(canonical, Arithmetic.WEIGHT_ONLY, 16, int(match[1]))
    if (match := _MULTIPOINT.fullmatch(canonical)) and 2 <= int(match[1]) <= 16 and 1 <= float(match[3]) <= 8:
        return _multipoint(int(match[1]), int(match[2]), float(match[3]))
    if match := _PAIR.fullmatch(canonical):
        activation_bits, weight_bits = int(match[1]), int(match[2])
        if 2 <= activation_bits <= 16 and 2 <= weight_bits <= 16:
            return _integer(canonical, activation_bits, weight_bits)
    raise PrecisionError(
        f"unknown precision {name!r}: use one of {', '.join(REALIZED)}, bfloat16wN or float16wN with 2 to 8 bits, sums of "
        "terms such as a8w4x2, or aXwY with 2 to 16 bits each"
    )
