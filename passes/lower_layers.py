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

A shuffle of a convolution's channels is left to the convolution's kernel, which stores them shuffled::

    def main(x):                          def main(x):
        lv = cls.gconv(x)                     lv = cls.gconv(x)          # request with shuffled=4
        lv1 = cls.take_0(lv)       →          lv1 = cls.take_0(lv)       # lv, "hquant.kernel": "in place"

A residual, or what an elementwise layer reads, is written over where no other layer reads it any more
(:mod:`tvm_hquant.overwritten_inputs`)::

    def conv3(x, residual):                                    def conv3(x, residual):
        return call_tir(cls.conv2d_…, (x, residual, …))   →        return call_tir_inplace(cls.conv2d_…, (x, …, residual), 6)

Operators without a kernel of ours are legalized by TVM, each in its own layer, so that they compile to the same code
here and in the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm
from tvm import IRModule

from tvm_hquant.channel_shuffles import find_absorbed_shuffles
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import KernelFamily, KernelRequest, LayerConstants
from tvm_hquant.layers import read_layers
from tvm_hquant.overwritten_inputs import find_overwritten_inputs
from tvm_hquant.relax_ir.kernel_calls import read_realized, with_kernels


def lower_layers(families: Sequence[KernelFamily]) -> Any:
    """The pass. ``families`` are the kernel families of the target, the best first.

    Raises (when run):
        KernelError: none of them has a kernel for a layer.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        realized = {layer.name: read_realized(mod[layer.function_name]) for layer in graph.layers}
        calls = [KernelCall(layer.name, _request(realized[layer.name]), layer.inputs) for layer in graph.layers]
        shuffles = find_absorbed_shuffles(calls, graph.outputs, families)
        for shuffle in shuffles.values():
            entry = realized[str(shuffle.tensor)]
            assert entry is not None
            realized[str(shuffle.tensor)] = shuffle.kernel.request, entry[1]
        for tensor, kernel in find_overwritten_inputs(calls, graph.outputs, families, shuffles).items():
            entry = realized[str(tensor)]
            assert entry is not None
            realized[str(tensor)] = kernel.request, entry[1]
        return with_kernels(mod, graph, realized, families, {str(name) for name in shuffles})

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.lower_layers")


def _request(realized: tuple[KernelRequest, LayerConstants] | None) -> KernelRequest | None:
    return realized[0] if realized is not None else None
