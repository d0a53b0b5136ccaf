"""Which weights of a lowered module an artifact keeps in fewer bits than its kernels read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import IRModule

from tvm_hquant.kernels.interface import FloatAnchorConstants, Kernel, KernelFamily, KernelRequest
from tvm_hquant.kernels.registry import select_kernel
from tvm_hquant.layers import read_layers
from tvm_hquant.numerics import narrow, widen
from tvm_hquant.operator_codec import decode
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.quantized_weights import QuantizedWeights
from tvm_hquant.relax_ir.kernel_calls import REQUEST_ATTRIBUTE, call_constants
from tvm_hquant.stored_weights import StoredWeights, stored_floats, stored_integers

Array = npt.NDArray[Any]


def packed_weights(mod: IRModule, plan: PrecisionPlan, families: Sequence[KernelFamily]) -> Mapping[str, StoredWeights]:
    """For each layer whose weights are smaller as bit-packed codes, these codes.

    Args:
        mod: the lowered module.
        plan: completed, so that it holds the codes.
        families: kernel families of the target, the best first.
    """
    found: dict[str, StoredWeights] = {}
    for layer in read_layers(mod).anchors:
        function, codes = mod[layer.function_name], plan.weights.get(layer.name)
        if codes is None:
            continue
        request: KernelRequest = decode(str(function.attrs[REQUEST_ATTRIBUTE]))
        array = call_constants(function)[0]
        stored: StoredWeights | None = None
        if array.dtype.kind == "i":
            stored = stored_integers(array)
        elif request.weights not in ("int8", "int16"):
            # A kernel of codes that reads them as floats has a few for each channel, and keeps them.
            stored = _floats(select_kernel(families, request), codes, array)
        # Whatever order a kernel packs in: what is made again must be what it reads, or the library keeps the array.
        if stored is not None and len(stored.data) < array.nbytes and _same_bits(stored.array(), array):
            found[layer.name] = stored
    return found


def _floats(kernel: Kernel, codes: QuantizedWeights, array: Array) -> StoredWeights | None:
    """Codes and scales in the kernel's order. The scales follow their channels, whose numbers it packs like weights."""
    values = kernel.request.weights
    shape = codes.codes[0].shape
    channels = np.broadcast_to(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)), shape)
    ordered = _packed(kernel, codes.codes[0])
    # 16-bit floats hold integers of 8 bits: a channel's number goes through in two parts.
    numbers = _packed(kernel, channels & 255) + 256 * _packed(kernel, channels >> 8)
    if ordered.shape != array.shape:
        return None
    return stored_floats(values, ordered, codes.scales[0][numbers])


def _packed(kernel: Kernel, integers: Array) -> Array:
    storage = kernel.request.weights
    values = narrow(integers.astype(np.float32), storage)
    bias = np.zeros(len(integers), np.float32)
    return widen(kernel.pack(FloatAnchorConstants(values, bias, -np.inf, np.inf))[0], storage).astype(np.int64)


def _same_bits(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
