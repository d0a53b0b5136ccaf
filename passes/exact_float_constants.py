"""Float constants that C source can hold to the bit, for targets of kind ``c``.

TVM's C code generator prints seven digits of a float (``codegen_c.cc``), and a float32 needs nine: the coefficients of a
polynomial would come out changed. What seven digits do not say is put together exactly from integers that they do say and a
power of two; C compilers compute that when they compile. So are infinities, which the generator prints as a name that
C does not have. (Conversions of integers would not do: TVM folds them into floats again.)

Before::

    y[i] = T.call_pure_extern("float32", "fmaf", x[i], T.float32(1.00000012), T.float32(0.5))

After::

    y[i] = T.call_pure_extern(
        "float32", "fmaf", x[i],
        T.call_pure_extern(
            "float32", "ldexpf",
            T.call_pure_extern("float32", "fmaf", T.float32(524288), T.float32(1048576), T.float32(65536)), -39,
        ),
        T.float32(0.5),
    )
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import IRModule, tirx

_CHUNK_BITS = 20
"""Of an integer that seven digits say."""
_BEYOND = 2000
"""A power of two that no float holds."""


def exact_float_constants() -> Any:
    """The pass. Works on all TIR functions of a module; NaN stays as it is."""

    def transform(mod: IRModule, _context: Any) -> IRModule:
        result = mod.clone()
        for variable, function in mod.functions_items():
            if isinstance(function, tirx.PrimFunc):
                result[variable] = tvm_ffi.structural_map(function, (tirx.FloatImm, _exact))
        return result

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.exact_float_constants")


def _exact(constant: Any) -> Any:
    """The constant, or calls that give it exactly where seven digits do not say it."""
    dtype = str(constant.ty.dtype)
    if dtype not in ("float32", "float64"):
        return constant
    value = float(np.dtype(dtype).type(constant.value))
    if math.isnan(value) or (math.isfinite(value) and float(np.dtype(dtype).type(f"{value:.6e}")) == value):
        return constant
    suffix = "f" if dtype == "float32" else ""
    if math.isinf(value):
        return _call(dtype, f"ldexp{suffix}", _float(dtype, math.copysign(1, value)), _BEYOND)
    fraction, exponent = math.frexp(abs(value))
    integer, exponent = int(fraction * 2**60), exponent - 60
    chunks = [integer >> shift & (1 << _CHUNK_BITS) - 1 for shift in (40, 20, 0)]
    while chunks[-1] == 0:
        chunks.pop()
        exponent += _CHUNK_BITS
    signed = [math.copysign(1, value) * chunk for chunk in chunks]
    whole = _float(dtype, signed[0])
    for chunk in signed[1:]:
        whole = _call(dtype, f"fma{suffix}", whole, _float(dtype, 1 << _CHUNK_BITS), _float(dtype, chunk))
    return _call(dtype, f"ldexp{suffix}", whole, exponent)


def _float(dtype: str, value: float) -> Any:
    return tirx.FloatImm(dtype, value)


def _call(dtype: str, name: str, *arguments: Any) -> Any:
    exact = [tirx.IntImm("int32", a) if isinstance(a, int) else a for a in arguments]
    return tirx.call_pure_extern(dtype, name, *exact)
