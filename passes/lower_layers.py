"""Stage 7: kernels of the target in place of the reference ones, constants packed for them.

Before::

    @R.function(private=True)
    def conv1(x: uint8):
        return R.call_tir(cls.reference_conv2d_…, (x, weight_codes, multiplier, offset, limits, zero_points))

After::

    @R.function(private=True)
    def conv1(x: uint8):
        R.func_attr({..., "hquant.kernel": "avx512_vnni.conv2d[14x2]"})
        return R.call_tir(cls.avx512_vnni_conv2d_14x2_…, (x, packed_weights, start, multiplier, …))

Operators without a kernel of ours are legalized by TVM, each in its own layer, so that they compile to the same code
here and in the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import IRModule

from tvm_hquant.kernels.interface import KernelFamily
from tvm_hquant.layers import read_layers
from tvm_hquant.relax_ir.kernel_calls import read_realized, with_kernels


def lower_layers(families: Sequence[KernelFamily]) -> Any:
    """The pass. ``families`` are the kernel families of the target, the best first.

    Raises (when run):
        KernelError: none of them has a kernel for a layer.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        realized = {layer.name: read_realized(mod[layer.function_name]) for layer in graph.layers}
        return with_kernels(mod, graph, realized, families)

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.lower_layers")
