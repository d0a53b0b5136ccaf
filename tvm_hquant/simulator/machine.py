"""Runs programs whose kernels are compiled: a flat list of calls on buffers that are assigned beforehand.

It needs TVM's runtime alone and knows nothing of layers, so that a worker process can have one too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tvm

Array = npt.NDArray[Any]


class Call(NamedTuple):
    """One step of a program: what is computed (the hash of its realization), from which values, and which value it is."""

    realization: int
    inputs: tuple[int, ...]
    key: int


class CallProgram(NamedTuple):
    """A program as calls; ``outputs`` are the keys of what it gives. Graph inputs have the keys 0, 1, 2…"""

    calls: tuple[Call, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class BoundKernel:
    """What one realization calls.

    Attributes:
        symbol: name of the compiled function; empty for a view, which gives the memory of its input another shape.
        constants: packed arrays that follow the activations.
        shape, dtype: of the output.
        returns: whether the function returns its output, as Relax functions do, instead of filling a buffer.
    """

    symbol: str
    constants: tuple[Array, ...]
    shape: tuple[int, ...]
    dtype: str
    returns: bool = False


@dataclass(frozen=True, eq=False)
class _Part:
    """The calls of one program that earlier ones have not made, and views of where its outputs lie after them."""

    calls: tuple[tuple[Any, tuple[Any, ...]], ...]
    outputs: tuple[Array, ...]


class Schedule:
    """Programs that run one after another on one sample, each value computed once.

    ``values`` holds the buffer of every value by key, where all were kept.
    """

    def __init__(self, inputs: Sequence[Array], parts: Sequence[_Part], values: Mapping[int, Any]) -> None:
        self._inputs = inputs
        self._parts = parts
        self.values = values

    def run(self, inputs: Sequence[Array]) -> list[tuple[Array, ...]]:
        """Outputs of every program, as copies. A single sample fills all of a larger batch axis."""
        given, batch = len(inputs[0]), len(self._inputs[0])
        kept = slice(given) if given < batch else ...
        for buffer, values in zip(self._inputs, inputs, strict=True):
            np.copyto(buffer, values)
        results = []
        for part in self._parts:
            for function, arguments in part.calls:
                function(*arguments)
            results.append(tuple(output[kept].copy() for output in part.outputs))
        return results


class KernelMachine:
    """Functions, bound constants and a pool of buffers that all schedules share: only one may run at a time.

    Args:
        inputs: shape and dtype of each graph input, batch axis first.
    """

    def __init__(self, inputs: Sequence[tuple[tuple[int, ...], str]]) -> None:
        self._device = tvm.cpu()
        self._inputs = [tvm.runtime.empty(shape, dtype, self._device) for shape, dtype in inputs]
        self._functions: dict[str, Callable[..., Any]] = {}
        self._bound: dict[int, tuple[BoundKernel, tuple[Any, ...]]] = {}
        self._pool: dict[tuple[tuple[int, ...], str], list[Any]] = {}

    def add_functions(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        """Makes compiled functions known by name."""
        self._functions.update(functions)

    def bind(self, realization: int, kernel: BoundKernel) -> None:
        """Makes a realization known, with its constants in memory of the device."""
        constants = tuple(tvm.runtime.tensor(a, self._device) for a in kernel.constants)
        self._bound[realization] = (kernel, constants)

    def has(self, realization: int) -> bool:
        """Whether a realization was bound."""
        return realization in self._bound

    def missing(self, programs: Iterable[CallProgram]) -> set[int]:
        """Realizations that were not bound yet."""
        return {call.realization for program in programs for call in program.calls} - self._bound.keys()

    @property
    def buffers(self) -> int:
        """How many buffers there are."""
        return sum(map(len, self._pool.values()))

    def schedule(self, programs: Sequence[CallProgram], keep_all: bool = False) -> Schedule:
        """Assigns buffers to all values of the programs; each lives until its last reader, or on, with ``keep_all``."""
        new, last_use, root = _plan_values(programs, self._is_view)
        values: dict[int, Any] = dict(enumerate(self._inputs))
        free = {signature: list(tensors) for signature, tensors in self._pool.items()}
        parts = []
        position = 0
        for program, calls in zip(programs, new, strict=True):
            made = []
            for call in calls:
                bound, constants = self._bound[call.realization]
                arguments = tuple(values[key] for key in call.inputs)
                if self._is_view(call):
                    values[call.key] = arguments[0]._create_view(bound.shape)
                else:
                    output = self._take(free, bound)
                    values[call.key] = output
                    made.append(self._prepared(bound, (*arguments, *constants), output))
                self._release(free, values, last_use[position] if not keep_all else (), root)
                position += 1
            parts.append(_Part(tuple(made), tuple(np.from_dlpack(values[key]) for key in program.outputs)))
            self._release(free, values, last_use[position] if not keep_all else (), root)
            position += 1
        views = [np.from_dlpack(tensor) for tensor in self._inputs]
        return Schedule(views, parts, values if keep_all else {})

    def prepared_call(self, call: Call, values: Mapping[int, Any]) -> Callable[[], Any]:
        """One call alone, on the values of a schedule that kept all; to time it."""
        bound, constants = self._bound[call.realization]
        arguments = tuple(values[key] for key in call.inputs)
        function, given = self._prepared(bound, (*arguments, *constants), values[call.key])
        return lambda: function(*given)

    def _is_view(self, call: Call) -> bool:
        return not self._bound[call.realization][0].symbol

    def _prepared(self, bound: BoundKernel, arguments: tuple[Any, ...], output: Any) -> tuple[Any, tuple[Any, ...]]:
        function = self._functions[bound.symbol]
        if bound.returns:
            return (lambda *given: output.copyfrom(function(*given))), arguments
        return function, (*arguments, output)

    def _take(self, free: dict[tuple[tuple[int, ...], str], list[Any]], bound: BoundKernel) -> Any:
        signature = (bound.shape, bound.dtype)
        if free.get(signature):
            return free[signature].pop()
        tensor = tvm.runtime.empty(bound.shape, bound.dtype, self._device)
        self._pool.setdefault(signature, []).append(tensor)
        return tensor

    @staticmethod
    def _release(
        free: dict[tuple[tuple[int, ...], str], list[Any]],
        values: Mapping[int, Any],
        roots: Sequence[int],
        root: Mapping[int, int],
    ) -> None:
        for key in roots:
            if root[key] == key:
                tensor = values[key]
                free.setdefault((tuple(int(d) for d in tensor.shape), str(tensor.dtype)), []).append(tensor)


def _plan_values(
    programs: Sequence[CallProgram], is_view: Callable[[Call], bool]
) -> tuple[list[list[Call]], dict[int, tuple[int, ...]], dict[int, int]]:
    """What each program computes anew, which memory is free after each position, and whose memory each value has.

    Positions count the calls, and the end of every program, where its outputs are read.
    """
    new: list[list[Call]] = []
    root: dict[int, int] = {}
    last: dict[int, int] = {}
    position = 0
    for program in programs:
        own = []
        for call in program.calls:
            if call.key in root:
                continue
            own.append(call)
            # Memory of graph inputs is nobody's to release: their keys have no root of their own.
            root[call.key] = root.get(call.inputs[0], call.inputs[0]) if is_view(call) else call.key
            for key in (*call.inputs, call.key):
                last[root.get(key, key)] = position
            position += 1
        for key in program.outputs:
            last[root.get(key, key)] = position
        position += 1
        new.append(own)
    freed: dict[int, list[int]] = {number: [] for number in range(position)}
    for key, where in last.items():
        if root.get(key) == key:
            freed[where].append(key)
    return new, {number: tuple(keys) for number, keys in freed.items()}, root
