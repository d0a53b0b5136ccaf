"""The fused multiply-add of float32, which NumPy does not have, from float64 operations.

The product of two float32 numbers has at most 48 significant bits, so float64 holds it exactly. The sum of it and the
third number is rounded to odd (S. Boldo, G. Melquiond: Emulation of a FMA and correctly rounded sums, IEEE Trans.
Computers 57(4), 2008): where float64 cannot hold the sum, the neighbour with an odd last bit is taken. Rounding that to
float32, which has more than two bits less, then gives what one rounding of the exact sum would have given.

Rounding twice goes wrong only where the float64 sum lies exactly between two float32 numbers, so the rounding to odd is
spent on those elements alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]


def sum_rounded_to_odd(a: DoubleArray, b: DoubleArray) -> DoubleArray:
    """float64 ``a + b``, rounded to odd: the neighbour of the exact sum whose last bit is 1, or the sum if exact.

    The error of the sum comes from Knuth's two-sum. Infinities and NaN pass through as in an ordinary addition.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.asarray(a + b)
        part = total - a
        error = (a - (total - part)) + (b - part)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(error) & np.isfinite(total) & ((bits & 1) == 0)
    away_from_zero = (error > 0) == (total > 0)
    moved: DoubleArray = np.where(inexact, bits + np.where(away_from_zero, 1, -1), bits).view(np.float64)
    return moved


_BELOW_FLOAT32 = 0x1FFFFFFF
"""The bits of a float64 that a float32 does not have."""
_HALFWAY = 0x10000000
"""What they hold exactly between two neighbouring normal float32 numbers."""
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)


def round_sum(product: DoubleArray, addend: DoubleArray, denormal_sums: bool = True) -> FloatArray:
    """``product + addend`` with a single rounding to float32, ties to even.

    Args:
        product: float64, not 0-dimensional.
        addend: float64, broadcast to the shape of the product.
        denormal_sums: whether an inexact sum may be below the normal float32 numbers. False saves a look at every
            element, and is right where all numbers are multiples of 2⁻¹⁴⁹, the smallest denormal.
    """
    total = product + addend
    doubtful = (total.view(np.int64) & _BELOW_FLOAT32) == _HALFWAY
    if denormal_sums:
        doubtful |= (np.abs(total) < _SMALLEST_NORMAL) & (total != 0)
    rounded = total.astype(np.float32)
    if doubtful.any():
        addends = np.broadcast_to(addend, product.shape)[doubtful]
        rounded[doubtful] = sum_rounded_to_odd(product[doubtful], addends).astype(np.float32)
    return rounded


def fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> FloatArray:
    """a·b + c with a single rounding to float32, ties to even; the arguments are broadcast.

    Args:
        a, b, c: float32 values of any shapes that broadcast. Other types are converted to float32 first.

    Returns:
        float32, of the broadcast shape. Overflow gives infinity, 0·∞ and ∞−∞ NaN; denormal results are rounded once.
    """
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        x, y, z = (np.asarray(value, np.float32).astype(np.float64) for value in (a, b, c))
        product, addend = np.broadcast_arrays(np.atleast_1d(x * y), z)
        return round_sum(product, addend).reshape(np.broadcast_shapes(x.shape, y.shape, z.shape))


def integer_fma(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> FloatArray:
    """:func:`fma` for integers ``a``, the sums of an integer layer; they are rounded to float32 first, as everywhere.

    An integer times a float32 number is a multiple of 2⁻¹⁴⁹, and so is every sum: below the normal numbers all are exact, and
    the look for inexact ones is saved.
    """
    x, y, z = np.asarray(a, np.float32), np.asarray(b, np.float32), np.asarray(c, np.float32)
    shape = np.broadcast_shapes(x.shape, y.shape, z.shape)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        product = np.multiply(np.atleast_1d(x), y, dtype=np.float64)
        return round_sum(product, z.astype(np.float64), denormal_sums=False).reshape(shape)
