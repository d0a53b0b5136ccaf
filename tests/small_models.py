"""Small Relax modules in channels-last form, and how to run any module, for tests of passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax
from tvm.script import ir as I
from tvm.script import relax as R


@I.ir_module
class _Residual:
    @R.function
    def main(
        x: R.Tensor((1, 3, 8, 8), "float32"),
        conv1_weight: R.Tensor((8, 3, 3, 3), "float32"),
        conv1_bias: R.Tensor((8,), "float32"),
        conv2_weight: R.Tensor((8, 8, 3, 3), "float32"),
        head_weight: R.Tensor((8, 10), "float32"),
        head_bias: R.Tensor((10,), "float32"),
    ) -> R.Tensor((1, 10), "float32"):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            nhwc = R.permute_dims(x, [0, 2, 3, 1])
            conv1 = R.nn.conv2d(nhwc, conv1_weight, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
            biased = R.add(conv1, conv1_bias)
            relu1 = R.nn.relu(biased)
            conv2 = R.nn.conv2d(relu1, conv2_weight, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
            summed = R.add(conv2, relu1)
            relu2 = R.nn.relu(summed)
            pooled = R.nn.max_pool2d(relu2, (2, 2), (2, 2), layout="NHWC")
            mean = R.mean(pooled, axis=[1, 2], keepdims=True)
            flat = R.reshape(mean, (1, 8))
            product = R.matmul(flat, head_weight)
            logits = R.add(product, head_bias)
            R.output(logits)
        return logits


def with_weights(mod: IRModule, outputs: Sequence[str], seed: int = 0) -> IRModule:
    """The module with random values for its weights, as the frontend hands them over."""
    rng = np.random.default_rng(seed)
    main = mod["main"]
    count = int(main.attrs["num_input"])
    values = []
    for parameter in list(main.params)[count:]:
        shape = [int(d) for d in parameter.ty.shape]
        fan_in = max(1, int(np.prod(shape[1:])) if len(shape) == 4 else shape[0])
        values.append(tvm.runtime.tensor((rng.normal(size=shape) / np.sqrt(fan_in)).astype("float32")))
    names = [p.name for p in list(main.params)[:count]]
    main = main.with_attr("params", values).with_attr("hquant.inputs", names).with_attr("hquant.outputs", list(outputs))
    result = mod.clone()
    result["main"] = main
    return result


def residual_module(seed: int = 0) -> IRModule:
    """Two convolutions, the second with a residual, a pool, a mean and a dense layer."""
    return with_weights(_Residual, ["logits"], seed)


def run_module(mod: IRModule, *inputs: Any) -> list[np.ndarray]:
    """Outputs of ``main`` under TVM's default pipeline; weights that are parameters are bound first."""
    main = mod["main"]
    if main.attrs and "params" in main.attrs:
        count = int(main.attrs["num_input"])
        weights = dict(zip(list(main.params)[count:], list(main.attrs["params"]), strict=True))
        mod = relax.transform.BindParams("main", weights)(mod)
    executable = relax.build(mod, target=tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(a)) for a in inputs))
    return [r.numpy() for r in ([result] if hasattr(result, "numpy") else result)]


def assert_calls(mod: IRModule, expected: str) -> None:
    """That ``main`` is the one of a module ``Expected`` in TVMScript, which may leave out the functions that it calls."""
    stubs = "".join(_stub(mod, g.name_hint) for g in mod.get_global_vars() if g.name_hint != "main")
    main = mod["main"].without_attr("hquant.inputs").without_attr("hquant.outputs")
    tvm.ir.assert_structural_equal(main, tvm.script.from_source(expected + stubs)["main"], map_free_vars=True)


def _stub(mod: IRModule, name: str) -> str:
    """A function of the same type."""
    function = mod[name]
    if not isinstance(function, relax.Function):
        return ""
    parameters = ", ".join(f"a{i}: {_type(p.ty)}" for i, p in enumerate(function.params))
    result = _type(function.ret_ty)
    return f"    @R.function(private=True)\n    def {name}({parameters}) -> {result}:\n        return R.zeros({result[9:-1]})\n"


def _type(ty: relax.TensorType) -> str:
    return f'R.Tensor({tuple(int(d) for d in ty.shape)}, "{ty.dtype}")'
