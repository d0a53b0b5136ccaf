"""Between lowering and TVM's virtual machine: intermediate tensors of a function share blocks of memory.

Before (after ``relax.transform.CallTIRRewrite``)::

    alloc = R.builtin.alloc_tensor(R.shape([1, 8, 8, 4]), "float32", 0, "global")
    cls.conv1(x, alloc)
    alloc1 = R.builtin.alloc_tensor(R.shape([1, 8, 8, 4]), "uint8", 0, "global")
    cls.conv2(alloc, alloc1)
    alloc2 = R.builtin.alloc_tensor(R.shape([1, 8, 8, 4]), "uint8", 0, "global")
    cls.conv3(alloc1, alloc2)
    ...

After::

    storage = R.memory.alloc_storage(R.shape([1024]), 0, "global", "uint8")
    storage1 = R.memory.alloc_storage(R.shape([256]), 0, "global", "uint8")
    alloc = R.memory.alloc_tensor(storage, 0, R.shape([1, 8, 8, 4]), "float32", 0)
    cls.conv1(x, alloc)
    alloc1 = R.memory.alloc_tensor(storage1, 0, R.shape([1, 8, 8, 4]), "uint8", 0)
    cls.conv2(alloc, alloc1)
    alloc2 = R.memory.alloc_tensor(storage, 0, R.shape([1, 8, 8, 4]), "uint8", 0)
    cls.conv3(alloc1, alloc2)
    ...

TVM's ``StaticPlanBlockMemory`` shares blocks only between tensors of one dtype, and in the order in which they are made; here
the largest are placed first (:mod:`tvm_hquant.memory_plan`). Tensors that leave the function stay apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import DataType, IRModule, relax, tirx

from tvm_hquant.memory_plan import Lifetime, plan_blocks
from tvm_hquant.relax_ir.describe import operator_name
from tvm_hquant.relax_ir.main_function import variables

_ALLOCATION = "relax.builtin.alloc_tensor"
_VIEWS = ("relax.reshape",)


def plan_memory() -> Any:
    """The pass. Functions need one block of bindings, as ``ToNonDataflow`` and ``CallTIRRewrite`` leave them."""

    def transform(mod: IRModule, _context: Any) -> IRModule:
        result = mod.clone()
        for variable, function in mod.functions_items():
            if isinstance(function, relax.Function):
                result[variable] = _planned(mod, function)
        return result

    return tvm.transform.module_pass(transform, opt_level=0, name="hquant.plan_memory")


@dataclass(frozen=True, eq=False)
class _Tensor:
    """An allocation whose tensor stays within the function."""

    position: int
    shape: Any
    dtype: str
    lifetime: Lifetime


def _planned(mod: IRModule, function: Any) -> Any:
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    tensors = _tensors(mod, bindings, function.body.body)
    if not tensors:
        return function
    plan = plan_blocks([tensor.lifetime for tensor in tensors])
    typed = relax.BlockBuilder().normalize
    changed, storages = [], []
    for size in plan.sizes:
        block = typed(relax.op.memory.alloc_storage(relax.ShapeExpr([size]), 0, "global", "uint8"))
        storages.append(relax.Var("storage", block.ty))
        changed.append(relax.VarBinding(storages[-1], block))
    planned = {
        tensor.position: typed(relax.op.memory.alloc_tensor(storages[block], 0, tensor.shape, tensor.dtype))
        for tensor, block in zip(tensors, plan.blocks, strict=True)
    }
    changed += [
        relax.VarBinding(binding.var, planned[i]) if i in planned else binding for i, binding in enumerate(bindings)
    ]
    body = typed(relax.SeqExpr([relax.BindingBlock(changed)], function.body.body))
    return relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)


def _tensors(mod: IRModule, bindings: Sequence[Any], result: Any) -> list[_Tensor]:
    """The tensors that can be placed, with the positions of the bindings that use them or a view of them."""
    root: dict[Any, int] = {}
    last: dict[int, int] = {}
    escaping: set[int] = set()
    for position, binding in enumerate(bindings):
        value = binding.value
        read = {root[v] for v in variables(value) if v in root}
        for tensor in read:
            last[tensor] = position
        if operator_name(value) == _ALLOCATION and _is_plain(value):
            root[binding.var] = last[position] = position
        elif isinstance(value, relax.Var) or operator_name(value) in _VIEWS:
            source = value if isinstance(value, relax.Var) else value.args[0]
            if source in root:
                root[binding.var] = root[source]
        elif not _keeps_nothing(mod, value):
            # What it gives may hold on to what it was given.
            escaping |= read
    escaping |= {root[v] for v in variables(result) if v in root}
    found = []
    for position in sorted(set(root.values()) - escaping):
        shape, dtype = bindings[position].value.args[0], str(bindings[position].value.args[1].value)
        size = math.prod(int(d) for d in shape.values) * DataType(dtype).itemsize
        found.append(_Tensor(position, shape, dtype, Lifetime(size, position, last[position])))
    return found


def _is_plain(allocation: Any) -> bool:
    """Whether an allocation is of a known size, in the ordinary memory of the first device."""
    shape, dtype, device, scope = allocation.args
    return (
        isinstance(shape, relax.ShapeExpr)
        and all(isinstance(d, tirx.IntImm) for d in shape.values)
        and isinstance(dtype, tvm.ir.expr.GenericConst)
        and int(device.value) == 0
        and str(scope.value) == "global"
    )


def _keeps_nothing(mod: IRModule, value: Any) -> bool:
    """Whether a value is the call of a TIR function, which writes into its arguments and gives nothing."""
    return (
        isinstance(value, relax.Call)
        and isinstance(value.op, tvm.ir.GlobalVar)
        and isinstance(mod[value.op], tirx.PrimFunc)
    )
