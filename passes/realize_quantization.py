"""Stage 6: integer and 16-bit arithmetic in place of real numbers.

Before::

    @R.function(private=True)
    def conv1(x: uint8):
        R.func_attr({"hquant.precision": "a8w8", "hquant.formats": "[[uint8, …], uint8, …]", ...})
        x_real = (x.astype("float32") - 128) * 0.02
        ...                                            # convolution, bias and relu in float32
        return (clip(round(lv3 / 0.05), 0, 255)).astype("uint8")

After::

    @R.function(private=True)
    def conv1(x: uint8):
        R.func_attr({..., "hquant.request": "{...}", "hquant.constants": "IntegerAnchorConstants"})
        return R.call_tir(cls.reference_conv2d_…, (x, weight_codes, multiplier, offset, limits, zero_points))

The kernels are the reference ones: plain loops that say exactly what the arithmetic contract says and compile for any
target. ``lower_layers`` puts kernels of the target in their place. Layers that TVM itself legalizes stay as they are.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import IRModule

from tvm_hquant.kernels.interface import KernelRequest, LayerConstants
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.layers import FORMATS_ATTRIBUTE, PRECISION_ATTRIBUTE, Layer, read_layers
from tvm_hquant.operator_codec import decode
from tvm_hquant.operators import Convert, Opaque
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.precision import parse_precision
from tvm_hquant.realization import realize_conversion, realize_layer
from tvm_hquant.relax_ir.kernel_calls import with_kernels


def realize_quantization(plan: PrecisionPlan) -> Any:
    """The pass. ``plan`` gives the weight codes; layers without stored codes are quantized here, the same way.

    Raises (when run):
        PrecisionError: the sums of a layer could leave int32 in its precision.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        graph = read_layers(mod)
        realized = {layer.name: _realize(mod, layer, plan) for layer in graph.layers}
        return with_kernels(mod, graph, realized, (ReferenceFamily(),))

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.realize_quantization")


def _realize(mod: IRModule, layer: Layer, plan: PrecisionPlan) -> tuple[KernelRequest, LayerConstants] | None:
    function = mod[layer.function_name]
    inputs, output = decode(str(function.attrs[FORMATS_ATTRIBUTE]))
    if isinstance(layer.operator, Opaque):
        return None
    if isinstance(layer.operator, Convert):
        return realize_conversion(layer.operator.shape, inputs[0], output)
    precision = parse_precision(str(function.attrs[PRECISION_ATTRIBUTE]))
    return realize_layer(layer, precision, inputs, output, plan.layer_weights(layer, precision))
