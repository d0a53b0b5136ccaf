"""Runs programs sample by sample with the kernels that deployment uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import IRModule, relax
from tvm import cpu as cpu_device

from tvm_hquant.compilation import build_module
from tvm_hquant.kernels.instruction_set import instruction_set_names
from tvm_hquant.kernels.interface import Kernel, KernelFamily, KernelRequest
from tvm_hquant.kernels.registry import select_kernel
from tvm_hquant.layers import LayerGraph, read_layers
from tvm_hquant.operators import Opaque
from tvm_hquant.passes.simulate_quantization import simulate_quantization
from tvm_hquant.relax_ir.kernel_calls import is_view, kernel_symbol
from tvm_hquant.simulator.kernel_cache import KernelCache, kernel_key
from tvm_hquant.simulator.kernel_library import Library, built_kernels, exported, loaded_functions
from tvm_hquant.simulator.machine import BoundKernel, Call, CallProgram, KernelMachine, Schedule
from tvm_hquant.simulator.program import Program, Step
from tvm_hquant.tensor_format import STORAGE_DTYPE

Array = npt.NDArray[Any]

_SCHEDULES = 4
"""How many schedules are remembered: calibration, a search and a report take turns."""


class SimulationEngine:
    """Compiles kernels once per request and runs programs.

    Samples are the outer loop, programs the inner one: a program runs only the steps whose values no program before it has
    made for the same sample, so memory does not grow with samples, and a program that differs in one layer costs what
    lies behind that layer.

    Args:
        mod: the partitioned module.
        families: kernel families of this machine, the best first.
        target: this machine.
        cache: where compiled kernels are found and kept; None: nowhere.
    """

    def __init__(
        self, mod: IRModule, families: Sequence[KernelFamily], target: Any, cache: KernelCache | None = None
    ) -> None:
        self.graph: LayerGraph = read_layers(mod)
        self._mod = mod
        self.families = tuple(families)
        self.target = target
        self.cache = cache
        self._kernels: dict[KernelRequest, Kernel] = {}
        self._compiled: set[KernelRequest] = set()
        self._symbols: set[str] = set()
        self._has_functions = False
        self.instruction_sets = tuple(f.name for f in families if f.name in instruction_set_names())
        self.machine = KernelMachine([(t.shape, t.dtype) for t in self.graph.inputs.values()])
        self._schedules: dict[tuple[str, ...], Schedule] = {}

    def compile(self, programs: Iterable[Program]) -> int:
        """Compiles what the programs need and is neither compiled yet nor in the cache; returns the number of new kernels."""
        new: dict[str, Kernel] = {}
        needs_functions = False
        for program in programs:
            for step in program.steps:
                if step.request is None:
                    needs_functions = not self._has_functions
                elif not is_view(step.request) and step.request not in self._compiled:
                    kernel = self._kernel(step.request)
                    self._compiled.add(step.request)
                    if kernel_symbol(kernel) not in self._symbols:
                        new[kernel_symbol(kernel)] = kernel
        if needs_functions:
            virtual_machine = relax.VirtualMachine(self._built_functions(), cpu_device())
            self.machine.add_functions({name: virtual_machine[name] for name in self._opaque_functions()})
            self._has_functions = True
        if new:
            self._add_kernels(new)
        return len(new)

    def _add_kernels(self, kernels: Mapping[str, Kernel]) -> None:
        self._symbols |= kernels.keys()
        if self.cache is None:
            executable = built_kernels(list(kernels.values()), self.target)
            self.machine.add_functions({s: executable.mod.get_function(s, query_imports=True) for s in kernels})
            return
        keys = {symbol: kernel_key(kernel, self.target) for symbol, kernel in kernels.items()}
        libraries = list(self.cache.find({key: symbol for symbol, key in keys.items()}))
        found = {symbol for library in libraries for symbol in library.symbols}
        missing = [kernel for symbol, kernel in kernels.items() if symbol not in found]
        if missing:
            symbols = tuple(map(kernel_symbol, missing))
            libraries.append(Library(exported(built_kernels(missing, self.target)), symbols))
            self.cache.add(libraries[-1], keys)
        for library in libraries:
            self.machine.add_functions(loaded_functions(library))

    def cached_libraries(self, requests: Iterable[KernelRequest]) -> tuple[Library, ...]:
        """What the cache has of the kernels of some requests."""
        if self.cache is None:
            return ()
        kernels = [self._kernel(request) for request in requests]
        return self.cache.find({kernel_key(kernel, self.target): kernel_symbol(kernel) for kernel in kernels})

    def keep_library(self, library: Library, requests: Iterable[KernelRequest]) -> None:
        """Keeps in the cache what was compiled elsewhere for some requests."""
        if self.cache is not None:
            kernels = [self._kernel(request) for request in requests]
            self.cache.add(library, {kernel_symbol(kernel): kernel_key(kernel, self.target) for kernel in kernels})

    def symbol(self, request: KernelRequest) -> str:
        """Name of the compiled function of a request."""
        return kernel_symbol(self._kernel(request))

    def function_library(self) -> Library:
        """A library of the operators that TVM legalizes, for other processes."""
        return Library(exported(self._built_functions()), (), self._opaque_functions())

    def _built_functions(self) -> Any:
        return build_module(simulate_quantization([])(self._mod), self.target, "this machine")

    def call_program(self, program: Program) -> CallProgram:
        """A program as calls of kernels, with the constants of all of them bound."""
        for step in program.steps:
            if not self.machine.has(step.realization):
                self.machine.bind(step.realization, self.bound_kernel(step))
        return as_calls(program)

    def bound_kernel(self, step: Step) -> BoundKernel:
        """The function of a step with its constants packed for it."""
        request = step.request
        if request is None:
            assert step.layer is not None
            shape, dtype = step.layer.operator.output_shape, str(self._mod[step.layer.function_name].ret_ty.dtype)
            return BoundKernel(step.layer.function_name, (), shape, dtype, returns=True)
        shape, dtype = request.operator.output_shape, STORAGE_DTYPE[request.output]
        if is_view(request):
            return BoundKernel("", (), shape, dtype)
        assert step.constants is not None
        kernel = self._kernel(request)
        return BoundKernel(kernel_symbol(kernel), kernel.pack(step.constants), shape, dtype)

    def run(self, inputs: Mapping[str, Array], programs: Sequence[Program]) -> list[tuple[Array, ...]]:
        """Outputs of every program for one sample, or for as many as the graph's batch axis counts.

        One sample for a graph with a larger batch is repeated to fill it, and only its own outputs come back.
        """
        identity = tuple(program.digest for program in programs)
        if identity not in self._schedules:
            if len(self._schedules) == _SCHEDULES:
                self._schedules.pop(next(iter(self._schedules)))
            self._schedules[identity] = self.machine.schedule([self.call_program(program) for program in programs])
        return self._schedules[identity].run([inputs[name] for name in self.graph.inputs])

    def tensors(self, inputs: Mapping[str, Array], program: Program) -> dict[str, Array]:
        """All tensors of a program for one sample, by name, as float32 where the program makes them so.

        The arrays are views that the next call overwrites.
        """
        values = self._all_values(inputs, program)
        found = {name: np.from_dlpack(values[key]) for key, name in enumerate(self.graph.inputs)}
        for step in program.steps:
            if step.layer is not None:
                found[step.tensor] = np.from_dlpack(values[step.key])
        return found

    def step_values(self, inputs: Mapping[str, Array], program: Program) -> list[Array]:
        """What every step of a program makes for one sample, in order (views that the next call overwrites)."""
        values = self._all_values(inputs, program)
        return [values[step.key].numpy() for step in program.steps]

    def time_layers(
        self, inputs: Mapping[str, Array], program: Program, only: str | None = None, repeat: int = 10
    ) -> dict[str, float]:
        """Median time of each layer's kernel in microseconds, on the values that one sample gives it.

        ``only`` names the one layer to time. Operators that TVM legalizes and views are not timed.
        """
        self.compile([program])
        values = self._all_values(inputs, program)
        times: dict[str, float] = {}
        for step in program.steps:
            if step.layer is None or step.request is None or is_view(step.request):
                continue
            if only is not None and step.layer.name != only:
                continue
            call = self.machine.prepared_call(as_call(step), values)
            samples = []
            for _ in range(repeat + 1):
                start = time.perf_counter()
                call()
                samples.append(time.perf_counter() - start)
            # The first call brings weights and code into the caches.
            times[step.layer.name] = 1e6 * statistics.median(samples[1:])
        return times

    def _all_values(self, inputs: Mapping[str, Array], program: Program) -> Mapping[int, Any]:
        identity = ("every value", program.digest)
        if identity not in self._schedules:
            self._schedules.pop(next((key for key in self._schedules if key[0] == identity[0]), ()), None)
            self._schedules[identity] = self.machine.schedule([self.call_program(program)], keep_all=True)
        schedule = self._schedules[identity]
        schedule.run([inputs[name] for name in self.graph.inputs])
        return schedule.values

    def _opaque_functions(self) -> tuple[str, ...]:
        return tuple(layer.function_name for layer in self.graph.layers if isinstance(layer.operator, Opaque))

    def _kernel(self, request: KernelRequest) -> Kernel:
        if request not in self._kernels:
            self._kernels[request] = select_kernel(self.families, request)
        return self._kernels[request]


def as_call(step: Step) -> Call:
    """A step as a machine runs it."""
    return Call(step.realization, step.inputs, step.key)


def as_calls(program: Program) -> CallProgram:
    """A program as a machine runs it."""
    return CallProgram(tuple(map(as_call, program.steps)), program.outputs)
