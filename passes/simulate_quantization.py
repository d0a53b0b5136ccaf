"""Stage 4: one module with the kernels of every (layer, precision) and of every conversion that plans may need.

Before: a partitioned module, one private function per layer, and the requests of the candidates.

After::

    @T.prim_func
    def avx512_vnni_conv2d_14x2_…(x, packed_weights, start, multiplier, offset, limits, …, y): ...
    @T.prim_func
    def float32_conv2d_14x2_…(x, packed_weights, bias, limits, y): ...
    @R.function
    def split_0(x): ...                  # operators that TVM legalizes, as they were

Weights, scales, zero points and limits are arguments: going from one plan to another compiles nothing. These are the
kernels that deployment uses, and they are called with the same constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import IRModule, relax

from tvm_hquant.kernels.interface import Kernel
from tvm_hquant.layers import read_layers
from tvm_hquant.operators import Opaque
from tvm_hquant.relax_ir.kernel_calls import kernel_symbol
from tvm_hquant.relax_ir.relax_functions import with_called_functions


def simulate_quantization(kernels: Sequence[Kernel]) -> Any:
    """The pass. ``kernels`` are those of all candidates; equal ones are kept once."""

    def transform(mod: IRModule, _context: Any) -> IRModule:
        builder = relax.BlockBuilder()
        for symbol, kernel in {kernel_symbol(k): k for k in kernels}.items():
            builder.add_func(kernel.function.with_attr("global_symbol", symbol), symbol)
        # A module without a model gives kernels alone.
        layers = read_layers(mod).layers if mod.functions_items() else ()
        for layer in layers:
            if isinstance(layer.operator, Opaque):
                function = mod[layer.function_name].with_attr("global_symbol", layer.function_name)
                builder.add_func(function, layer.function_name)
        return with_called_functions(builder.get(), mod)

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.simulate_quantization")
