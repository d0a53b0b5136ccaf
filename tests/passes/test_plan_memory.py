"""Protects memory: intermediate tensors share blocks, and none that is still needed is overwritten."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_hquant.passes.plan_memory import plan_memory


@I.ir_module
class Before:
    @T.prim_func(s_tir=True)
    def copy(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for i in range(64):
            y[i] = x[i] + T.float32(1)

    @T.prim_func(s_tir=True)
    def shorten(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "uint8")):
        for i in range(64):
            y[i] = T.Cast("uint8", x[i])

    @T.prim_func(s_tir=True)
    def join(x: T.Buffer((8, 8), "uint8"), z: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for i in range(64):
            y[i] = z[i] + T.Cast("float32", x[i // 8, i % 8])

    @R.function
    def main(x: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
        R.func_attr({"relax.force_pure": True})
        cls = Before
        first = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
        cls.copy(x, first)
        second = R.builtin.alloc_tensor(R.shape([64]), "uint8", 0, "global")
        cls.shorten(first, second)
        seen = R.reshape(second, R.shape([8, 8]))
        third = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
        cls.copy(x, third)
        output = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
        cls.join(seen, third, output)
        return output


def run(mod: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    transform = relax.transform
    passes = [
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]
    executable = relax.build(mod, target="llvm", relax_pipeline=tvm.transform.Sequential(passes))
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def test_tensors_of_any_dtype_share_blocks() -> None:
    """The third tensor takes the place of the first; the view of the second keeps that alive; the output stays apart."""

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
            R.func_attr({"relax.force_pure": True})
            cls = Expected
            storage = R.memory.alloc_storage(R.shape([256]), 0, "global", "uint8")
            storage1 = R.memory.alloc_storage(R.shape([64]), 0, "global", "uint8")
            first = R.memory.alloc_tensor(storage, 0, R.shape([64]), "float32")
            cls.copy(x, first)
            second = R.memory.alloc_tensor(storage1, 0, R.shape([64]), "uint8")
            cls.shorten(first, second)
            seen = R.reshape(second, R.shape([8, 8]))
            third = R.memory.alloc_tensor(storage, 0, R.shape([64]), "float32")
            cls.copy(x, third)
            output = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
            cls.join(seen, third, output)
            return output

        @T.prim_func(s_tir=True)
        def copy(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
            for i in range(64):
                y[i] = x[i] + T.float32(1)

        @T.prim_func(s_tir=True)
        def shorten(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "uint8")):
            for i in range(64):
                y[i] = T.Cast("uint8", x[i])

        @T.prim_func(s_tir=True)
        def join(x: T.Buffer((8, 8), "uint8"), z: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
            for i in range(64):
                y[i] = z[i] + T.Cast("float32", x[i // 8, i % 8])

    after = plan_memory()(Before)
    tvm.ir.assert_structural_equal(after, Expected)
    x = np.arange(64, dtype="float32")
    np.testing.assert_array_equal(run(after, x), 2 * (x + 1))
    np.testing.assert_array_equal(run(Before, x), 2 * (x + 1))


@I.ir_module
class InPlaceBefore:
    @T.prim_func(s_tir=True)
    def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for i in range(64):
            y[i] = x[i] * T.float32(2)

    @T.prim_func(s_tir=True)
    def add_to(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for i in range(64):
            y[i] = y[i] + x[i]

    @R.function
    def main(x: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
        R.func_attr({"relax.force_pure": True})
        cls = InPlaceBefore
        residual = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
        cls.double(x, residual)
        second = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
        cls.double(residual, second)
        cls.add_to(second, residual)
        total = residual
        third = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
        cls.double(total, third)
        output = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
        cls.double(third, output)
        return output


def test_a_sum_written_over_its_residual_needs_no_block() -> None:
    """It has that of the residual, until it is read itself: the tensor made of it takes the place of the other summand."""

    @I.ir_module
    class Expected:
        @T.prim_func(s_tir=True)
        def double(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
            for i in range(64):
                y[i] = x[i] * T.float32(2)

        @T.prim_func(s_tir=True)
        def add_to(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
            for i in range(64):
                y[i] = y[i] + x[i]

        @R.function
        def main(x: R.Tensor((64,), "float32")) -> R.Tensor((64,), "float32"):
            R.func_attr({"relax.force_pure": True})
            cls = Expected
            storage = R.memory.alloc_storage(R.shape([256]), 0, "global", "uint8")
            storage1 = R.memory.alloc_storage(R.shape([256]), 0, "global", "uint8")
            residual = R.memory.alloc_tensor(storage, 0, R.shape([64]), "float32")
            cls.double(x, residual)
            second = R.memory.alloc_tensor(storage1, 0, R.shape([64]), "float32")
            cls.double(residual, second)
            cls.add_to(second, residual)
            total = residual
            third = R.memory.alloc_tensor(storage1, 0, R.shape([64]), "float32")
            cls.double(total, third)
            output = R.builtin.alloc_tensor(R.shape([64]), "float32", 0, "global")
            cls.double(third, output)
            return output

    after = plan_memory()(InPlaceBefore)
    tvm.ir.assert_structural_equal(after, Expected)
    x = np.arange(64, dtype="float32")
    np.testing.assert_array_equal(run(after, x), 4 * (2 * x + 4 * x))
    np.testing.assert_array_equal(run(InPlaceBefore, x), 4 * (2 * x + 4 * x))
