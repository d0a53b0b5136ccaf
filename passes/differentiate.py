"""The gradients of a loss with respect to what layers read and to their sums, as a module of layers again.

Before: a partitioned float module, one private function per layer::

    def main(x):
        conv1 = cls.conv1(x)            # relu(conv2d(x, constant) + constant)
        fc = cls.fc(conv1)

After: one flat ``main``, which ``partition_layers`` makes layers of, so that the kernels of the project compute it::

    def main(x, target, conv1.weight, fc.weight, fc.data_gradient.weight, ...):
        lv = R.nn.conv2d(x, conv1.weight, ...)
        lv1 = R.add(lv, constant)
        lv2 = R.clip(lv1, 0, inf)
        lv3 = R.matmul(lv2, fc.weight)
        log_probabilities = R.nn.log_softmax(lv3)
        loss = -R.sum(target * log_probabilities) / batch
        lv3_adjoint = ...                                              # softmax(lv3) − target
        lv2_adjoint = R.matmul(lv3_adjoint, fc.data_gradient.weight)
        lv1_adjoint = R.where(R.greater(lv2, 0), lv2_adjoint, 0)
        ...
        return loss, log_probabilities, ...

The loss is the cross entropy of the first output against ``target``, probabilities of all classes: the label's class is 1
for the cross entropy with labels; the probabilities of another model for the divergence from it, but for a constant. An
output of one element z is a binary logit and counts as the logits 0 and z; an output that a softmax layer makes is taken
before it.

``relax.transform.Gradient`` gives gradients with respect to parameters only. A parameter is therefore added to every tensor
whose gradient is asked for, and after differentiation, which it stands for with the value 0, taken out again. Its gradient is
that at one reading of the tensor: where two layers read a tensor, each has its own. The backward layers of a layer ``conv1``
are called ``conv1.data_gradient``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import IRModule, relax

import tvm_hquant.relax_ir.gradient_rules  # noqa: F401  (registers the rules that TVM lacks)
from tvm_hquant.errors import ModelError
from tvm_hquant.layers import INPUTS_ATTRIBUTE, OUTPUTS_ATTRIBUTE, LayerGraph, constant_array, is_constant, read_layers
from tvm_hquant.operators import Softmax
from tvm_hquant.relax_ir.constant_folding import evaluate
from tvm_hquant.relax_ir.describe import clip_bounds, is_conv2d_anchor, is_dense_anchor, shape_of
from tvm_hquant.relax_ir.main_function import (
    INPUT_COUNT_ATTRIBUTE,
    WEIGHTS_ATTRIBUTE,
    MainFunction,
    read_main,
    substitute,
    variables,
    write_main,
)

Array = npt.NDArray[Any]

TARGET = "target"
"""Name of the input with the probabilities of all classes, float32 [batch, classes] (two for a binary logit)."""
LOSS = "loss"
LOG_PROBABILITIES = "log_probabilities"
"""Name of the output with the logarithms of the probabilities of all classes, float32 [batch, classes]."""
INPUT_GRADIENT = ".input_gradient"
SUM_GRADIENT = ".sum_gradient"
DATA_GRADIENT = ".data_gradient"
_WEIGHT = ".weight"


def differentiate() -> Any:
    """The pass.

    The module's outputs are ``loss``, ``log_probabilities``, and for each layer with weights ``<layer>.input_gradient``, with
    respect to the tensor that it reads first, and ``<layer>.sum_gradient``, with respect to its sums before the bias; gradients
    have the shapes of those tensors.

    Raises (when run):
        ModelError: an operator has no gradient.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        return _differentiated(mod)

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.differentiate")


@dataclass(frozen=True, eq=False)
class _Probe:
    """A parameter that is added to a tensor: ``name`` is the output that its gradient becomes."""

    name: str
    parameter: Any


def _differentiated(mod: IRModule) -> IRModule:
    graph = read_layers(mod)
    flat, probes, weights = _flat_loss(mod, graph)
    try:
        derived = relax.transform.Gradient("main", require_grads=[p.parameter for p in probes])(flat)
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"the network has no gradient that TVM can derive: {lines[-1]}") from error
    count = len(graph.inputs) + 1
    function = derived["main_adjoint"].with_attrs({INPUT_COUNT_ATTRIBUTE: count + len(probes)})
    function = function.with_attr(WEIGHTS_ATTRIBUTE, [tvm.runtime.tensor(a) for a in weights.values()])
    main_variable = derived.get_global_var("main")
    # Rules may have added TIR functions.
    others = {g: f for g, f in derived.functions_items() if not isinstance(f, relax.Function)}
    whole = IRModule({**others, main_variable: function})
    main = read_main(whole)
    inputs, parameters = main.inputs[:count], set(main.inputs[count:])
    bindings, names = _without_probes(main, parameters)
    fields = [names.get(f, f) for f in _output_fields(main.output, dict(main.bindings))]
    attributes = {
        INPUTS_ATTRIBUTE: [*graph.inputs, TARGET],
        OUTPUTS_ATTRIBUTE: [LOSS, LOG_PROBABILITIES, *(p.name for p in probes)],
    }
    reduced = MainFunction(inputs, main.weights, tuple(bindings), relax.Tuple(fields), attributes)
    return write_main(whole, _folded(reduced))


def _flat_loss(mod: IRModule, graph: LayerGraph) -> tuple[IRModule, list[_Probe], dict[str, Array]]:
    """``main`` with all layers inlined, the loss as its only output, and a probe wherever a gradient is asked for."""
    builder = relax.BlockBuilder()
    inputs = {name: relax.Var(name, relax.TensorType(t.shape, t.dtype)) for name, t in graph.inputs.items()}
    logits_of = _logits_tensor(graph)
    batch = next(iter(graph.inputs.values())).shape[0]
    classes = max(2, int(np.prod(graph.tensor_shape(logits_of))) // batch)
    target = relax.Var(TARGET, relax.TensorType((batch, classes), "float32"))
    weights: dict[str, Array] = {}
    parameters: dict[str, Any] = {}
    probes: list[_Probe] = []
    for layer in graph.anchors:
        weights[layer.name] = _anchor_weights(mod[layer.function_name])
        parameters[layer.name] = relax.Var(layer.name + _WEIGHT, relax.TensorType(weights[layer.name].shape, "float32"))
        shapes = (graph.tensor_shape(layer.inputs[0]), layer.operator.output_shape)
        for suffix, shape in zip((INPUT_GRADIENT, SUM_GRADIENT), shapes, strict=True):
            name = layer.name + suffix
            probes.append(_Probe(name, relax.Var(name, relax.TensorType(shape, "float32"))))
    probe_of = {p.name: p.parameter for p in probes}
    everything = [*inputs.values(), target, *probe_of.values(), *parameters.values()]
    with builder.function("main", everything):
        with builder.dataflow():
            tensors: dict[str, Any] = dict(inputs)
            for layer in graph.layers:
                arguments = [tensors[t] for t in layer.inputs]
                if layer.is_anchor:
                    arguments[0] = builder.emit(relax.op.add(arguments[0], probe_of[layer.name + INPUT_GRADIENT]))
                probe = probe_of.get(layer.name + SUM_GRADIENT)
                function = mod[layer.function_name]
                tensors[layer.name] = _inlined(builder, function, arguments, parameters.get(layer.name), probe)
            results = [builder.emit_output(r) for r in _cross_entropy(builder, tensors[logits_of], target)]
        builder.emit_func_output(relax.Tuple(results))
    flat = {g: f for g, f in mod.functions_items() if not isinstance(f, relax.Function)}
    built = builder.finalize()
    return IRModule({**flat, **dict(built.functions_items())}), probes, weights


def _logits_tensor(graph: LayerGraph) -> str:
    output = graph.outputs[0]
    layer = graph.by_name.get(output)
    return layer.inputs[0] if layer is not None and isinstance(layer.operator, Softmax) else output


def _inlined(builder: Any, function: Any, arguments: Sequence[Any], weights: Any, probe: Any) -> Any:
    """Emits a layer's body; an anchor's constant becomes a parameter, and its probe is added to its sums."""
    known: dict[Any, Any] = dict(zip(function.params, arguments, strict=True))
    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if is_conv2d_anchor(value) or is_dense_anchor(value):
                call = relax.Call(value.op, [known[value.args[0]], weights], value.attrs, value.ty_args)
                known[binding.var] = builder.emit(relax.op.add(builder.emit(call), probe))
                continue
            bounds = clip_bounds(value)
            if bounds is not None:
                # relu too: its rule in TVM reads what is clamped, which would then have to be kept.
                known[binding.var] = builder.emit(relax.op.clip(known[value.args[0]], *bounds))
                continue
            known[binding.var] = builder.emit(substitute(value, known))
    return substitute(function.body.body, known)


def _cross_entropy(builder: Any, output: Any, target: Any) -> list[Any]:
    """The loss and the logarithms of all probabilities."""
    batch, classes = shape_of(target)
    logits = builder.emit(relax.op.reshape(output, (batch, -1)))
    if shape_of(logits)[1] < classes:
        logits = builder.emit(relax.op.nn.pad(logits, [0, 0, 1, 0]))
    logarithms = builder.emit(relax.op.nn.log_softmax(logits, axis=-1))
    total = builder.emit(relax.op.sum(builder.emit(relax.op.multiply(target, logarithms))))
    return [builder.emit(relax.op.multiply(total, relax.const(-1.0 / batch, "float32"))), logarithms]


def _anchor_weights(function: Any) -> Array:
    """The constant of an anchor as it stands in its body: OIHW of a convolution, [in, out] of a dense layer."""
    for block in function.body.blocks:
        for binding in block.bindings:
            if is_conv2d_anchor(binding.value) or is_dense_anchor(binding.value):
                return constant_array(binding.value.args[1])
    raise ModelError("a layer with weights has none in its body: differentiate the float module, before it is realized")


def _without_probes(main: MainFunction, probes: set[Any]) -> tuple[list[tuple[Any, Any]], dict[Any, Any]]:
    """The bindings with probes set to 0 and without those that only give a tensor another name; what replaced those."""
    known: dict[Any, Any] = {}
    kept = []
    for var, value in main.bindings:
        if isinstance(value, relax.Var):
            known[var] = known.get(value, value)
            continue
        added = [a for a in value.args if a in probes] if isinstance(value, relax.Call) else []
        if added:
            other = value.args[0] if value.args[1].same_as(added[0]) else value.args[1]
            known[var] = known.get(other, other)
        else:
            kept.append((var, substitute(value, known)))
    return kept, known


def _output_fields(output: Any, definitions: Mapping[Any, Any]) -> list[Any]:
    """The tensors of ((loss, log_probabilities), (gradient, …)), flat."""
    if isinstance(output, relax.Var) and isinstance(definitions.get(output), (relax.Tuple, relax.Var)):
        return _output_fields(definitions[output], definitions)
    if isinstance(output, relax.Tuple):
        return [tensor for field in output.fields for tensor in _output_fields(field, definitions)]
    return [output]


def _folded(main: MainFunction) -> MainFunction:
    """Weights of backward layers computed: what depends on a weight alone becomes a weight; what on nothing, a constant."""
    weights = dict(main.weights)
    source: dict[Any, str] = {w: w.name.removesuffix(_WEIGHT) for w in weights}
    known: dict[Any, Any] = {}
    bindings: list[tuple[Any, Any]] = []
    normalizer = relax.BlockBuilder()

    def array_of(expression: Any) -> Array | None:
        if isinstance(expression, relax.Var):
            return weights.get(expression)
        return constant_array(expression) if is_constant(expression) else None

    for var, value in main.bindings:
        value = normalizer.normalize(substitute(value, known))
        values = evaluate(value, array_of) if isinstance(value, relax.Call) else None
        if values is None:
            bindings.append((var, value))
            continue
        read = next((v for v in variables(value) if v in weights), None)
        if read is None:
            known[var] = relax.const(values, str(values.dtype))
            continue
        known[var] = relax.Var(f"{source[read]}{DATA_GRADIENT}{_WEIGHT}", var.ty)
        weights[known[var]], source[known[var]] = values, source[read]
    return MainFunction(main.inputs, weights, tuple(bindings), substitute(main.output, known), main.attributes)
