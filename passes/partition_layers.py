"""Stage 2: one private function per layer.

Before (channels-last, weights still parameters of ``main``)::

    def main(x, conv1_weight, conv1_bias):
        lv = R.nn.conv2d(x, conv1_weight, ...)
        lv1 = R.add(lv, conv1_bias)
        lv2 = R.add(lv1, x)
        lv3 = R.nn.relu(lv2)
        lv4 = R.nn.max_pool2d(lv3, ...)

After::

    @R.function(private=True)
    def conv1(x, residual):
        R.func_attr({"hquant.layer": "conv1", "hquant.operator": "{...}"})
        lv = R.nn.conv2d(x, constant, ...)
        lv1 = R.add(lv, constant)
        lv2 = R.add(lv1, residual)
        return R.nn.relu(lv2)

    def main(x):
        lv3 = cls.conv1(x, x)
        lv4 = cls.max_pool2d_0(lv3)

An anchor (convolution or dense layer with constant weights) takes its bias, then one residual addition, then one clamp,
each only where nothing else reads the value in between. An addition takes a clamp. A product of two activations takes
the permutations around it and a factor. Local response normalization, activations such as HardSwish, which come as chains
of elementwise operators, and channels that are laid out as pixels are one layer each. Every other operator is
a layer of its own. ``FuseOpsByPattern`` matches the same shapes, but merges equal functions into one; a layer must keep
its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_hquant.errors import ModelError
from tvm_hquant.layers import LAYER_ATTRIBUTE, OPERATOR_ATTRIBUTE, constant_array, is_constant
from tvm_hquant.operator_codec import encode
from tvm_hquant.operators import (
    Add,
    AveragePool2D,
    BatchMatmul,
    Epilogue,
    LocalResponseNormalization,
    Movement,
    Opaque,
    Operator,
    Unary,
)
from tvm_hquant.relax_ir.batch_matmuls import find_batch_matmuls
from tvm_hquant.relax_ir.depth_to_space import find_depth_to_space
from tvm_hquant.relax_ir.describe import (
    clip_bounds,
    describe_anchor,
    describe_call,
    is_conv2d_anchor,
    is_dense_anchor,
    is_float32,
    operator_name,
    shape_of,
    tensor_arguments,
)
from tvm_hquant.relax_ir.local_response_normalization import find_local_response_normalizations
from tvm_hquant.relax_ir.relax_functions import function_identifier, tir_function_names, with_called_functions
from tvm_hquant.relax_ir.unary_chains import find_activations

_WEIGHT_SUFFIX = re.compile(r"([._/]|__)(weights?|kernel|w)((_\d+)?|:0)$", re.IGNORECASE)


def partition_layers() -> Any:
    """The pass. It needs ``main`` in channels-last form with static shapes.

    Raises (when run):
        ModelError: control flow or another construct that is no call of an operator.
    """

    def transform(mod: IRModule, _context: Any) -> IRModule:
        return _Partitioner(mod).module()

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.partition_layers")


@dataclass(frozen=True, eq=False)
class _Group:
    """Bindings that become one layer, in order, and the tensors that flow in."""

    bindings: tuple[Any, ...]
    inputs: tuple[Any, ...]
    operator: Operator
    name: str

    @property
    def output(self) -> Any:
        return self.bindings[-1].var


class _Partitioner:
    def __init__(self, mod: IRModule) -> None:
        self.mod = mod
        named = mod["main"]
        self.weight_names = _weight_names(named)
        self.main = _bind_weights(mod)["main"]
        self.bindings = [b for block in self.main.body.blocks for b in block.bindings]
        self.named_bindings = [b for block in named.body.blocks for b in block.bindings]
        self.users: dict[Any, list[int]] = {}
        for index, binding in enumerate(self.bindings):
            for argument in _operands(binding.value):
                self.users.setdefault(argument, []).append(index)
        for output in _operands(self.main.body.body) or [self.main.body.body]:
            self.users.setdefault(output, []).append(len(self.bindings))
        self.definition = {b.var: b.value for b in self.bindings}
        self.grouped: set[int] = set()
        self.taken_names: set[str] = set(tir_function_names(mod))
        self.counters: dict[str, int] = {}

    def module(self) -> IRModule:
        groups = self._groups()
        builder = relax.BlockBuilder()
        functions = {id(g): builder.add_func(_layer_function(g), function_identifier(g.name)) for g in groups}
        attributes = {k: v for k, v in dict(self.main.attrs).items() if k not in ("num_input", "params")}
        with builder.function("main", list(self.main.params), attributes):
            with builder.dataflow():
                replaced: dict[Any, Any] = {}
                for group in groups:
                    call = relax.Call(functions[id(group)], [replaced.get(i, i) for i in group.inputs])
                    replaced[group.output] = builder.emit(call, name_hint=function_identifier(group.name))
                output = builder.emit_output(self._output(self.main.body.body, replaced))
            builder.emit_func_output(output)
        return with_called_functions(builder.finalize(), self.mod)

    def _output(self, expression: Any, replaced: dict[Any, Any]) -> Any:
        if expression in self.definition and isinstance(self.definition[expression], relax.Tuple):
            expression = self.definition[expression]
        if isinstance(expression, relax.Tuple):
            return relax.Tuple([replaced.get(f, f) for f in expression.fields])
        return replaced.get(expression, expression)

    def _groups(self) -> list[_Group]:
        ends: dict[int, _Group] = {}
        pairs = [(b.var, b.value) for b in self.bindings]
        chains: list[tuple[tuple[int, ...], tuple[Any, ...], Operator]] = []
        chains += [(f.indices, f.inputs, f.operator) for f in find_batch_matmuls(pairs, self.users)]
        chains += [(f.indices, (f.data,), f.operator) for f in find_local_response_normalizations(pairs)]
        chains += [(f.indices, (f.data,), f.operator) for f in find_activations(pairs)]
        chains += [(f.indices, (f.data,), f.operator) for f in find_depth_to_space(pairs, self.users)]
        for positions, inputs, operator in chains:
            if self._is_closed(positions) and not self.grouped.intersection(positions):
                indices, group = self._finish(list(positions), inputs, operator, None)
                self.grouped.update(indices)
                ends[indices[-1]] = group
        for index, binding in enumerate(self.bindings):
            if index in self.grouped:
                continue
            value = binding.value
            if isinstance(value, relax.Tuple) or isinstance(binding.var.ty, relax.TupleType):
                continue
            indices, group = self._group_at(index)
            self.grouped.update(indices)
            ends[indices[-1]] = group
        return [ends[i] for i in sorted(ends)]

    def _group_at(self, index: int) -> tuple[list[int], _Group]:
        value = self.bindings[index].value
        if is_conv2d_anchor(value) or is_dense_anchor(value):
            return self._anchor_group(index)
        if isinstance(value, relax.TupleGetItem):
            return self._tuple_element(index)
        if not isinstance(value, relax.Call):
            raise ModelError(
                f"{self.bindings[index].var.name} is bound to a {type(value).__name__}, which cannot become a layer: "
                "only calls of operators can; export the model without control flow"
            )
        operator = describe_call(value)
        indices = [index]
        if isinstance(operator, Add) and (clamp := self._clamp_after(index)) is not None:
            indices.append(clamp)
            lower, upper = self._bounds(clamp)
            operator = Add(operator.shape, lower, upper)
        return self._finish(indices, tuple(tensor_arguments(value)), operator, None)

    def _anchor_group(self, index: int) -> tuple[list[int], _Group]:
        call = self.bindings[index].value
        channels = describe_anchor(call, Epilogue()).output_shape[-1]
        indices, inputs = [index], [call.args[0]]
        has_bias = has_residual = False
        lower, upper = -np.inf, np.inf
        if (following := self._only_user(index)) is not None and self._is_bias(following, channels):
            indices.append(following)
            has_bias = True
        if (following := self._only_user(indices[-1])) is not None:
            residual = self._residual(following, self.bindings[indices[-1]].var)
            if residual is not None:
                indices.append(following)
                inputs.append(residual)
                has_residual = True
        if (clamp := self._clamp_after(indices[-1])) is not None:
            indices.append(clamp)
            lower, upper = self._bounds(clamp)
        operator = describe_anchor(call, Epilogue(has_bias, has_residual, float(lower), float(upper)))
        return self._finish(indices, tuple(inputs), operator, self._weight_name(index))

    def _tuple_element(self, index: int) -> tuple[list[int], _Group]:
        """A call that gives a tuple is made once per element that is read, each time in a layer of its own."""
        element = self.bindings[index].value
        source = element.tuple_value
        producer = self.definition.get(source)
        if not isinstance(producer, relax.Call):
            raise ModelError(f"{self.bindings[index].var.name} takes an element of a tuple that no operator made")
        position = next(i for i, b in enumerate(self.bindings) if b.var.same_as(source))
        arguments = tensor_arguments(producer)
        shapes = tuple(shape_of(a) for a in arguments)
        operator = Opaque(operator_name(producer), shapes, shape_of(self.bindings[index].var))
        indices, group = self._finish([position, index], tuple(arguments), operator, None)
        return indices[1:], group

    def _finish(
        self, indices: list[int], inputs: tuple[Any, ...], operator: Operator, weight_name: str | None
    ) -> tuple[list[int], _Group]:
        call = self.bindings[indices[0]].value
        base = _layer_name(weight_name) if weight_name else self._counted(operator, call, len(indices))
        name = self._unique(base)
        return indices, _Group(tuple(self.bindings[i] for i in indices), inputs, operator, name)

    def _counted(self, operator: Operator, call: Any, chain_length: int) -> str:
        kind = operator_name(call).rsplit(".", 1)[-1] or type(operator).__name__.lower()
        if isinstance(operator, AveragePool2D) and operator.output_shape[1:3] == (1, 1):
            kind = "global_average_pool"
        if isinstance(operator, BatchMatmul):
            kind = "matmul"
        if isinstance(operator, LocalResponseNormalization):
            kind = "local_response_normalization"
        if isinstance(operator, Unary) and chain_length > 1:
            kind = operator.function_name
        if isinstance(operator, Movement) and chain_length > 1:
            kind = operator.function
        number = self.counters.get(kind, 0)
        self.counters[kind] = number + 1
        return f"{kind}_{number}"

    def _unique(self, base: str) -> str:
        name, number = base, 1
        while function_identifier(name) in self.taken_names or function_identifier(name) == "main":
            name, number = f"{base}_{number}", number + 1
        self.taken_names.add(function_identifier(name))
        return name

    def _weight_name(self, index: int) -> str | None:
        argument = self.named_bindings[index].value.args[1]
        return self.weight_names.get(argument, None)

    def _only_user(self, index: int) -> int | None:
        users = self.users.get(self.bindings[index].var, [])
        is_free = len(users) == 1 and users[0] < len(self.bindings) and users[0] not in self.grouped
        return users[0] if is_free else None

    def _is_bias(self, index: int, channels: int) -> bool:
        call = self.bindings[index].value
        return (
            operator_name(call) == "relax.add"
            and is_constant(call.args[1])
            and constant_array(call.args[1]).size == channels
            and (shape_of(call.args[1]) or (1,))[-1] == channels
            and shape_of(call)[-1] == channels
        )

    def _is_closed(self, indices: tuple[int, ...]) -> bool:
        """Whether only these bindings read what they compute, but for the last one."""
        return all(set(self.users.get(self.bindings[i].var, [])) <= set(indices) for i in indices[:-1])

    def _residual(self, index: int, value: Any) -> Any | None:
        call = self.bindings[index].value
        if operator_name(call) != "relax.add":
            return None
        others = [a for a in call.args if not a.same_as(value)]
        if len(others) != 1 or is_constant(others[0]) or not is_float32(others[0]):
            return None
        return others[0] if shape_of(others[0]) == shape_of(call) == shape_of(value) else None

    def _clamp_after(self, index: int) -> int | None:
        user = self._only_user(index)
        return user if user is not None and clip_bounds(self.bindings[user].value) is not None else None

    def _bounds(self, index: int) -> tuple[float, float]:
        bounds = clip_bounds(self.bindings[index].value)
        assert bounds is not None
        return bounds


def _operands(value: Any) -> list[Any]:
    """Variables that an expression reads."""
    if isinstance(value, relax.Call):
        return tensor_arguments(value) + [a for a in value.args if isinstance(a, relax.Var) and _is_tuple(a)]
    if isinstance(value, relax.Tuple):
        return list(value.fields)
    if isinstance(value, relax.TupleGetItem):
        return [value.tuple_value]
    return []


def _is_tuple(expression: Any) -> bool:
    return isinstance(expression.ty, relax.TupleType)


def _layer_function(group: _Group) -> Any:
    """The private function of a layer: its bindings over fresh parameters."""
    parameters: list[Any] = []
    for position, tensor in enumerate(group.inputs):
        parameters.append(relax.Var(f"input_{position}", tensor.ty))
    builder = relax.BlockBuilder()
    pending = list(zip(group.inputs, parameters, strict=True))
    known: dict[Any, Any] = {}
    attributes = {LAYER_ATTRIBUTE: group.name, OPERATOR_ATTRIBUTE: encode(group.operator)}

    def lookup(expression: Any) -> Any:
        if isinstance(expression, relax.Tuple):
            return relax.Tuple([lookup(f) for f in expression.fields])
        if not isinstance(expression, relax.Var):
            return expression
        if expression in known:
            return known[expression]
        # An input that is read twice has two parameters: each reading takes the next one.
        position = next((i for i, (tensor, _) in enumerate(pending) if tensor.same_as(expression)), None)
        if position is None:
            return next(p for t, p in zip(group.inputs, parameters, strict=True) if t.same_as(expression))
        return pending.pop(position)[1]

    with builder.function("layer", parameters, attributes, private=True):
        with builder.dataflow():
            value: Any = None
            for binding in group.bindings:
                value = builder.emit(_rebuilt(binding.value, lookup))
                known[binding.var] = value
            output = builder.emit_output(value)
        builder.emit_func_output(output)
    return builder.finalize()["layer"]


def _rebuilt(value: Any, lookup: Any) -> Any:
    if isinstance(value, relax.TupleGetItem):
        return relax.TupleGetItem(lookup(value.tuple_value), value.index)
    return relax.Call(value.op, [lookup(a) for a in value.args], value.attrs, value.ty_args)


def _weight_names(main: Any) -> dict[Any, str]:
    count = int(main.attrs["num_input"]) if main.attrs and "num_input" in main.attrs else len(main.params)
    return {p: str(p.name) for p in list(main.params)[count:]}


def _bind_weights(mod: IRModule) -> IRModule:
    """Weights that are parameters of ``main`` become constants in it."""
    main = mod["main"]
    if not main.attrs or "params" not in main.attrs:
        return mod
    count = int(main.attrs["num_input"])
    weights = dict(zip(list(main.params)[count:], list(main.attrs["params"]), strict=True))
    return relax.transform.BindParams("main", weights)(mod) if weights else mod


def _layer_name(weight_name: str) -> str:
    return _WEIGHT_SUFFIX.sub("", weight_name) or weight_name
