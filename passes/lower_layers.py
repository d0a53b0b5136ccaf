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

So is a shuffle into two groups of what two tensors are concatenated to, one of them made by a convolution
(:mod:`tvm_hquant.interleaved_concats`); and slices of channels are read where they are (:mod:`tvm_hquant.channel_slices`)::

    def main(x):                          def main(x):
        lv = cls.slice_0(x)                   lv = cls.slice_0(x)        # x, "hquant.kernel": "in place"
        lv1 = cls.slice_1(x)                  lv1 = cls.slice_1(x)       # x
        lv2 = cls.conv1(lv1)       →          lv2 = cls.conv1(x)         # request with sources=(Placement(58, 116),)
        lv3 = cls.conv2(lv2)                  lv3 = cls.conv2(lv2, x)    # request with interleaved=Interleaving(1, …)
        lv4 = cls.concat_0(lv, lv3)           lv4 = cls.concat_0(lv3)    # lv3
        lv5 = cls.take_0(lv4)                 lv5 = cls.take_0(lv4)      # lv4

A residual, or what an elementwise layer reads, is written over where no other layer reads it any more
(:mod:`tvm_hquant.overwritten_inputs`)::

    def conv3(x, residual):                                    def conv3(x, residual):
        return call_tir(cls.conv2d_…, (x, residual, …))   →        return call_tir_inplace(cls.conv2d_…, (x, …, residual), 6)

Operators without a kernel of ours are legalized by TVM, each in its own layer, so that they compile to the same code
here and in the simulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tvm
from tvm import IRModule

from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import KernelFamily, KernelRequest, LayerConstants
from tvm_hquant.layers import read_layers
from tvm_hquant.relax_ir.kernel_calls import read_realized, with_kernels
from tvm_hquant.stored_outputs import find_stored_outputs


def lower_layers(families: Sequence[KernelFamily]) -> Any:
    """The pass. ``families`` are the kernel families of the target, the best first.

    Raises (when run):
        KernelError: none of them has a kernel for a layer.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        realized = {layer.name: read_realized(mod[layer.function_name]) for layer in graph.layers}
        calls = [KernelCall(layer.name, _request(realized[layer.name]), layer.inputs) for layer in graph.layers]
        stored = find_stored_outputs(calls, graph.outputs, families)
        for tensor, kernel in stored.kernels.items():
            entry = realized[str(tensor)]
            assert entry is not None
            # The pass behind this one places parts of concatenations.
            realized[str(tensor)] = replace(kernel.request, placement=None), entry[1]
        read = {layer.name: tuple(map(str, stored.read(layer.name, layer.inputs))) for layer in graph.layers}
        return with_kernels(mod, graph, realized, families, {str(name) for name in stored.names}, read)

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.lower_layers")


def _request(realized: tuple[KernelRequest, LayerConstants] | None) -> KernelRequest | None:
    return realized[0] if realized is not None else None
