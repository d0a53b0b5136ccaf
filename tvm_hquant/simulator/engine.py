"""Runs programs sample by sample with the kernels that deployment uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import IRModule, relax

from tvm_hquant.compilation import build_module
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest, LayerConstants
from tvm_hquant.kernels.registry import select_kernel
from tvm_hquant.layers import LayerGraph, read_layers
from tvm_hquant.passes.simulate_quantization import simulate_quantization
from tvm_hquant.relax_ir.kernel_calls import is_view, kernel_symbol
from tvm_hquant.simulator.program import Program, Step
from tvm_hquant.tensor_format import STORAGE_DTYPE

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class _BoundKernel:
    """A compiled kernel with the packed constants of one layer; ``source`` is kept so that its identity stays its own."""

    function: Any
    constants: tuple[Any, ...]
    source: LayerConstants


class SimulationEngine:
    """Compiles kernels once per request and walks programs.

    Samples are the outer loop, programs the inner one: a program runs only the steps whose values the first program of
    the call has not made for the same sample, so memory does not grow with samples and a program that differs in one
    layer costs what lies behind that layer.

    Args:
        mod: the partitioned module.
        families: kernel families of this machine, the best first.
        target: this machine.
    """

    def __init__(self, mod: IRModule, families: Sequence[KernelFamily], target: Any) -> None:
        self.graph: LayerGraph = read_layers(mod)
        self._mod = mod
        self._families = tuple(families)
        self._target = target
        self._device = tvm.cpu()
        self._kernels: dict[KernelRequest, Kernel] = {}
        self._functions: dict[str, Any] = {}
        self._machine: Any = None
        self._bound: dict[int, _BoundKernel] = {}
        self._kept: dict[int, Any] = {}
        self._pool: dict[tuple[tuple[int, ...], str], list[Any]] = {}

    def compile(self, programs: Iterable[Program]) -> int:
        """Compiles what the programs need and is not compiled yet; returns the number of new kernels."""
        new: dict[str, Kernel] = {}
        needs_machine = False
        for program in programs:
            for step in program.steps:
                if step.request is None:
                    needs_machine = self._machine is None
                elif not is_view(step.request) and step.request not in self._kernels:
                    kernel = select_kernel(self._families, step.request)
                    self._kernels[step.request] = kernel
                    if kernel_symbol(kernel) not in self._functions:
                        new[kernel_symbol(kernel)] = kernel
        if not new and not needs_machine:
            return 0
        module = simulate_quantization(list(new.values()))(self._mod)
        executable = build_module(module, self._target, "this machine")
        if self._machine is None:
            self._machine = relax.VirtualMachine(executable, self._device)
        for symbol in new:
            self._functions[symbol] = executable.mod.get_function(symbol, query_imports=True)
        return len(new)

    def run(self, inputs: Mapping[str, Array], programs: Sequence[Program]) -> list[tuple[Array, ...]]:
        """Outputs of every program for one sample, or for as many as the graph's batch axis counts.

        One sample for a graph with a larger batch is repeated to fill it, and only its own outputs come back.
        """
        values = self._input_values(inputs)
        batch, given = next(iter(self.graph.inputs.values())).shape[0], len(next(iter(inputs.values())))
        kept = slice(given) if given < batch else ()
        results = []
        for number, program in enumerate(programs):
            own = self._walk(program, values, keep=number == 0)
            available = {**values, **own} if number else values
            results.append(tuple(available[key].numpy()[kept] for key in program.outputs))
            for step in program.steps:
                # A view shares the memory of what it views, which is released itself; TVM's own operators bring their own.
                if step.key in own and step.request is not None and not is_view(step.request):
                    self._release(own[step.key])
        return results

    def tensors(self, inputs: Mapping[str, Array], program: Program) -> dict[str, Array]:
        """All tensors of a program for one sample, by name, as float32 where the program makes them so.

        The arrays are views that the next call overwrites.
        """
        values = self._input_values(inputs)
        self._walk(program, values, keep=True)
        found = {name: np.from_dlpack(values[key]) for key, name in enumerate(self.graph.inputs)}
        for step in program.steps:
            if step.layer is not None:
                found[step.tensor] = np.from_dlpack(values[step.key])
        return found

    def step_values(self, inputs: Mapping[str, Array], program: Program) -> list[Array]:
        """What every step of a program makes for one sample, in order (views that the next call overwrites)."""
        values = self._input_values(inputs)
        self._walk(program, values, keep=True)
        return [values[step.key].numpy() for step in program.steps]

    def time_layers(
        self, inputs: Mapping[str, Array], program: Program, only: str | None = None, repeat: int = 10
    ) -> dict[str, float]:
        """Median time of each layer's kernel in microseconds, on the values that one sample gives it.

        ``only`` names the one layer to time. Operators that TVM legalizes and views are not timed.
        """
        self.compile([program])
        values = self._input_values(inputs)
        self._walk(program, values, keep=True)
        times: dict[str, float] = {}
        for step in program.steps:
            if step.layer is None or step.request is None or is_view(step.request):
                continue
            if only is not None and step.layer.name != only:
                continue
            bound = self._bound_kernel(step)
            output = self._pooled_buffer(step.request.operator.output_shape, STORAGE_DTYPE[step.request.output])
            call = (*(values[k] for k in step.inputs), *bound.constants, output)
            samples = []
            for _ in range(repeat + 1):
                start = time.perf_counter()
                bound.function(*call)
                samples.append(time.perf_counter() - start)
            # The first call brings weights and code into the caches.
            times[step.layer.name] = 1e6 * statistics.median(samples[1:])
            self._release(output)
        return times

    def _input_values(self, inputs: Mapping[str, Array]) -> dict[int, Any]:
        # Keys of graph inputs are the first ones that a program builder gives, in order.
        values: dict[int, Any] = {}
        for key, (name, tensor) in enumerate(self.graph.inputs.items()):
            array = inputs[name]
            if len(array) == 1 < tensor.shape[0]:
                array = np.repeat(array, tensor.shape[0], axis=0)
            values[key] = tvm.runtime.tensor(np.ascontiguousarray(array), self._device)
        return values

    def _walk(self, program: Program, values: dict[int, Any], keep: bool) -> dict[int, Any]:
        """Runs the steps that ``values`` lacks. With ``keep`` they are added to it, else returned."""
        own = values if keep else {}
        for step in program.steps:
            if step.key in values or step.key in own:
                continue
            arguments = [own[k] if k in own else values[k] for k in step.inputs]
            own[step.key] = self._call(step, arguments, keep)
        return {} if keep else own

    def _call(self, step: Step, arguments: list[Any], keep: bool) -> Any:
        request = step.request
        if request is None:
            assert step.layer is not None
            return self._machine[step.layer.function_name](*arguments)
        shape = request.operator.output_shape
        if is_view(request):
            return arguments[0]._create_view(shape)
        dtype = STORAGE_DTYPE[request.output]
        output = self._kept_buffer(step.key, shape, dtype) if keep else self._pooled_buffer(shape, dtype)
        bound = self._bound_kernel(step)
        bound.function(*arguments, *bound.constants, output)
        return output

    def _bound_kernel(self, step: Step) -> _BoundKernel:
        identity = id(step.constants)
        if identity not in self._bound:
            assert step.constants is not None
            assert step.request is not None
            kernel = self._kernels[step.request]
            packed = tuple(tvm.runtime.tensor(a, self._device) for a in kernel.pack(step.constants))
            self._bound[identity] = _BoundKernel(self._functions[kernel_symbol(kernel)], packed, step.constants)
        return self._bound[identity]

    def _kept_buffer(self, key: int, shape: tuple[int, ...], dtype: str) -> Any:
        if key not in self._kept:
            self._kept[key] = tvm.runtime.empty(shape, dtype, self._device)
        return self._kept[key]

    def _pooled_buffer(self, shape: tuple[int, ...], dtype: str) -> Any:
        free = self._pool.setdefault((shape, dtype), [])
        return free.pop() if free else tvm.runtime.empty(shape, dtype, self._device)

    def _release(self, tensor: Any) -> None:
        free = self._pool.setdefault((tuple(int(d) for d in tensor.shape), str(tensor.dtype)), [])
        free.append(tensor)
