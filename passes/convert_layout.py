"""Stage 1, second half: feature maps are stored channels-last.

Before::

    def main(x: R.Tensor((1, 3, 32, 32)), conv1_weight: R.Tensor((16, 3, 3, 3)), conv1_bias: R.Tensor((1, 16, 1, 1)), ...):
        lv = R.nn.conv2d(x, conv1_weight, ..., data_layout="NCHW", kernel_layout="OIHW")
        lv1 = R.add(lv, conv1_bias)
        lv2 = R.reshape(lv1, (1, 16384))
        gv = R.matmul(lv2, fc_weight)

After::

    def main(x: R.Tensor((1, 3, 32, 32)), conv1_weight: R.Tensor((16, 3, 3, 3)), conv1_bias: R.Tensor((1, 1, 1, 16)), ...):
        lv = R.permute_dims(x, axes=[0, 2, 3, 1])
        lv1 = R.nn.conv2d(lv, conv1_weight, ..., data_layout="NHWC", kernel_layout="OIHW")
        lv2 = R.add(lv1, conv1_bias)
        lv3 = R.reshape(lv2, (1, 16384))
        gv = R.matmul(lv3, fc_weight)   # rows of fc_weight permuted to (row, column, channel)

Convolution weights stay OIHW. Inputs and outputs of ``main`` keep the model's own shapes: a permute_dims stands where a
feature map enters or leaves. Elementwise operators, concat, pad, strided_slice, take, reductions and softmax follow what
they read, with axes and constants permuted. A permute_dims of the model's own between channels-first and channels-last
vanishes. A flatten in front of one dense layer with constant weights permutes the rows of the weights; any other operator
that needs the model's order gets it through a permute_dims. Where channels are laid out as the pixels of one channel at an
output, the reshape that this permute_dims becomes stays apart from the chain's own. Names of weights stay.

TVM's own ``relax.transform.ConvertLayout`` (src/relax/transform/convert_layout.cc) leaves permute_dims of weights in the
body and knows neither flatten nor take.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import tvm
from tvm import IRModule, relax

from tvm_hquant.relax_ir.canonical_rules.movement import merge_permutations, spell_reshape
from tvm_hquant.relax_ir.channels_last import Readers, convert_call
from tvm_hquant.relax_ir.depth_to_space import spell_single_channel_pixels
from tvm_hquant.relax_ir.graph_rewriting import Graph, rewrite
from tvm_hquant.relax_ir.main_function import MainFunction, read_main, substitute, variables, write_main
from tvm_hquant.stored_tensors import StoredTensor, TensorMap


def convert_layout() -> Any:
    """The pass. Its module has the form that ``canonicalize`` leaves.

    Raises (when run):
        ModelError: ``main`` is missing or branches.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        merged = rewrite(_converted(mod), (spell_reshape, merge_permutations))
        return rewrite(merged, (spell_single_channel_pixels,))

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.convert_layout")


def _converted(mod: IRModule) -> IRModule:
    main = read_main(mod)
    readers = _readers(main)
    tensors = TensorMap(Graph(mod, main.weights))
    for var, value in main.bindings:
        if isinstance(value, relax.Var):
            tensors.tensors[var] = tensors.of(value)
            continue
        converted = convert_call(var, value, tensors, readers) if isinstance(value, relax.Call) else None
        tensors.tensors[var] = converted if converted is not None else _in_model_order(var, value, tensors)
    output = tensors.plain(main.output)
    graph = tensors.graph
    return write_main(mod, MainFunction(main.inputs, graph.weights, tuple(graph.bindings), output, main.attributes))


def _in_model_order(var: Any, value: Any, tensors: TensorMap) -> StoredTensor:
    """The same expression on tensors in the model's order."""
    plain = {v: tensors.plain(v) for v in variables(value)}
    rank = len(var.ty.shape) if isinstance(var.ty, relax.TensorType) else 0
    return StoredTensor(tensors.graph.emit(substitute(value, plain), var.name), tuple(range(rank)))


def _readers(main: MainFunction) -> Readers:
    calls: dict[Any, tuple[Any, ...]] = {}
    counts: Counter[Any] = Counter(variables(main.output))
    for _, value in main.bindings:
        for var in variables(value):
            counts[var] += 1
            if isinstance(value, relax.Call):
                calls[var] = (*calls.get(var, ()), value)
    return Readers(calls, counts)
