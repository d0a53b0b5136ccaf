"""Where functions are timed: this machine, or a board over TVM's RPC.

Functions take turns in a random order, so that what the machine does besides hits all alike. Inside a network, activations have
just been written, but weights have not been read since the sample before: so every call takes another copy of the weights, and
the copies are larger together than the nearer caches. Over RPC, where calls cannot be timed singly, these caches are flushed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvm_hquant.artifact import check_linker
from tvm_hquant.cpu_features import cpu_identity
from tvm_hquant.cpu_pipeline import CPU_PIPELINE
from tvm_hquant.errors import DataError, TuningError
from tvm_hquant.runtime import Artifact
from tvm_hquant.target_spec import TargetSpec, read_target_spec

Array = npt.NDArray[Any]

CLEAR_GAIN = 0.98
"""Another function than the expected one has to be this much faster: smaller differences are noise."""
TURNS = 10
_NEAR_CACHES = 4 * 2**20
"""Bytes: more than the second-level cache of a core has."""
_MOST_COPIES = 16


def open_bench(artifact: Artifact, rpc: str | None = None) -> Bench:
    """The bench for an artifact's target.

    Args:
        rpc: ``HOST:PORT`` of a TVM RPC server on the target; this machine if not given.

    Raises:
        DataError: ``rpc`` has another form.
        TuningError: this machine cannot run the target's kernels, or nobody answers at ``rpc``.
        ToolchainError: the target's linker is missing.
    """
    spec = read_target_spec(artifact.manifest["target"]["spec"], "the artifact's target spec")
    check_linker(spec)
    return Bench(spec, rpc)


@dataclass(frozen=True, eq=False)
class TimedFunction:
    """A function of a loaded library, with argument lists for calls one after the other."""

    library: Any
    symbol: str
    arguments: Sequence[Sequence[Any]]

    def with_arguments(self, arguments: Sequence[Any]) -> TimedFunction:
        """The same function with other arguments."""
        return replace(self, arguments=[arguments])

    def bits(self) -> bytes:
        """All arguments after a call: a function may have several outputs, and write over inputs."""
        self.library[self.symbol](*self.arguments[0])
        return b"".join(argument.numpy().tobytes() for argument in self.arguments[0])

    def seconds(self, repeat: int) -> list[float]:
        """Of calls on this machine, each with the next arguments."""
        function = self.library[self.symbol]
        times = []
        for number in range(repeat + 1):
            arguments = self.arguments[number % len(self.arguments)]
            start = time.perf_counter()
            function(*arguments)
            times.append(time.perf_counter() - start)
        return times[1:]  # before the first call others had the caches

    def seconds_there(self, repeat: int, device: Any) -> list[float]:
        """Of calls on a remote device."""
        evaluator = self.library.time_evaluator(
            self.symbol, device, number=1, repeat=repeat, cache_flush_bytes=_NEAR_CACHES
        )
        return list(evaluator(*self.arguments[0]).results)


class Bench:
    """Compiles functions for a target and times them where it is.

    Args:
        rpc: ``HOST:PORT`` of a TVM RPC server on the target; this machine if not given.

    Attributes:
        spec: of the target.
        cpu: what records name as the processor (:func:`tvm_hquant.cpu_features.cpu_identity`; behind RPC the target's name).

    Raises:
        DataError: ``rpc`` has another form.
        TuningError: this machine cannot run the target's kernels, or nobody answers at ``rpc``.
    """

    def __init__(self, spec: TargetSpec, rpc: str | None) -> None:
        if rpc is None and (problems := spec.host_problems()):
            raise TuningError(
                f"cannot tune for {spec.name} here: {'; '.join(problems)}; name a board with --rpc HOST:PORT"
            )
        self.spec = spec
        self._session: Any = None
        self._uploads = 0
        self.cpu = cpu_identity() if rpc is None else spec.name
        self._device = tvm.cpu()
        if rpc is not None:
            host, _, port = rpc.rpartition(":")
            if not host or not port.isdigit():
                raise DataError(f"--rpc {rpc!r} is not HOST:PORT, such as 192.0.2.7:9090")
            try:
                self._session = tvm.rpc.connect(host, int(port), session_timeout=600)
            except (RuntimeError, OSError) as error:
                raise TuningError(f"nobody answers at {rpc}: {str(error).strip().splitlines()[-1]}") from None
            self._device = self._session.cpu(0)

    def microseconds(self, timed: Sequence[TimedFunction], repeat: int, turns: int = TURNS) -> list[float]:
        """The median of a call of each, in turns of ``repeat`` calls."""
        seconds: list[list[float]] = [[] for _ in timed]
        order = np.random.default_rng(0)
        for _ in range(turns):
            for number in order.permutation(len(timed)):
                one, times = timed[number], seconds[number]
                times += one.seconds(repeat) if self._session is None else one.seconds_there(repeat, self._device)
        return [1e6 * statistics.median(times) for times in seconds]

    def argument_lists(self, activations: Sequence[Any], constants: Sequence[Array], output: Any) -> list[list[Any]]:
        """Arguments for calls one after the other: the same activations and output, copies of the constants."""
        size = max(1, sum(array.nbytes for array in constants))
        copies = min(_MOST_COPIES, -(-_NEAR_CACHES // size)) if self._session is None else 1
        return [[*activations, *(self.tensor(a) for a in constants), output] for _ in range(copies)]

    def library(self, functions: Mapping[str, Any]) -> Any:
        """Compiled functions by their symbols, loaded where they are timed."""
        symbols = {symbol: function.with_attr("global_symbol", symbol) for symbol, function in functions.items()}
        target, compiler = self.spec.tvm_target(), self.spec.target.cross_compiler
        executable = tvm.compile(tvm.IRModule(symbols), target=target, tir_pipeline=CPU_PIPELINE)
        with tempfile.TemporaryDirectory(prefix="tvm_hquant_tuning_") as folder:
            # The server has mapped the libraries before: one of the same name would be written over them.
            self._uploads += 1
            path = Path(folder) / f"candidates_{self._uploads}.so"
            options = {} if compiler is None else {"fcompile": tvm.support.cc.cross_compiler(compiler)}
            executable.export_library(str(path), **options)
            if self._session is None:
                return tvm.runtime.load_module(str(path))
            self._session.upload(str(path))
            return self._session.load_module(path.name)

    def tensor(self, array: Array) -> Any:
        """An array where functions are timed."""
        return tvm.runtime.tensor(array, self._device)
