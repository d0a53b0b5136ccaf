"""The emulated board: finds it, runs Python scripts and TVM's RPC server on it, and cross-compiles for it.

The emulator runs single processes of the board and passes their system calls to this machine: paths that the board's
root has are the board's, all others (and the network) are this machine's.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
EMULATOR = "qemu-aarch64"
CROSS_COMPILER = "aarch64-linux-gnu-gcc"
PYTHON = "usr/bin/python3.11"
LAYOUT = 2
"""Raised when ``build_board.py`` lays the folder out in another way: older boards are built again."""

TARGET_FEATURES: Mapping[str, tuple[str, ...]] = {
    "cortex-a53": ("+neon",),
    "cortex-a72": ("+neon",),
    "cortex-a76": ("+neon", "+dotprod"),
    "neoverse-v1": ("+neon", "+dotprod", "+fp16fml", "+i8mm", "+bf16"),
}
"""The CPUs of the board, as LLVM names them, and LLVM's features that they have."""

RUNTIME_ONLY: Mapping[str, str] = {"TVM_USE_RUNTIME_LIB": "1"}
"""For a process with TVM's runtime library alone."""

_EMULATED_AS: Mapping[str, str] = {"neoverse-v1": "max"}
"""What the emulator calls a CPU that it does not have under LLVM's name: its own with all extensions."""


class BoardMissingError(Exception):
    """The board cannot be used here; the message says why and what to do."""


@dataclass(frozen=True)
class Marker:
    """What ``board.json``, the last file that the set-up writes, says about a board."""

    layout: int
    tvm: str

    @staticmethod
    def wanted() -> Marker:
        """A board that fits this checkout and this machine's TVM."""
        return Marker(LAYOUT, version("apache-tvm"))

    @staticmethod
    def read(folder: Path) -> Marker | None:
        """What a folder holds; None if it holds no finished board."""
        try:
            content = json.loads((folder / "board.json").read_text(encoding="utf-8"))
            return Marker(int(content["layout"]), str(content["tvm"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path) -> None:
        (folder / "board.json").write_text(json.dumps({"layout": self.layout, "tvm": self.tvm}), encoding="utf-8")


@dataclass(frozen=True)
class RpcServer:
    """A running RPC server: ``tvm.rpc.connect(server.host, server.port)``."""

    host: str
    port: int


@dataclass(frozen=True)
class Board:
    """A board that has been set up.

    Attributes:
        folder: holds ``root`` (the system), ``packages`` (its Python packages) and ``cpus`` (per CPU: the root with
            the ``/proc/cpuinfo`` that Linux shows on it).
    """

    folder: Path

    def command(
        self,
        *arguments: str | Path,
        cpu: str = "cortex-a76",
        environment: Mapping[str, str] | None = None,
        path: Sequence[Path] = (),
    ) -> list[str]:
        """The command of this machine that runs the board's Python with ``arguments``.

        Args:
            cpu: a key of :data:`TARGET_FEATURES`.
            environment: variables of the process on the board.
            path: folders for ``PYTHONPATH``, before the board's packages.
        """
        root = self.folder / "cpus" / cpu
        if not root.is_dir():
            raise BoardMissingError(
                f"the board has no CPU {cpu!r}: 'python tests/emulated_board/build_board.py' adds what is missing of "
                f"{', '.join(TARGET_FEATURES)}"
            )
        variables = {
            "PYTHONPATH": ":".join(str(p) for p in (*path, self.folder / "packages")),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TVM_NUM_THREADS": "1",
            **(environment or {}),
        }
        settings = [part for name, value in variables.items() for part in ("-E", f"{name}={value}")]
        unset = [part for name in sorted(_host_only_variables()) for part in ("-U", name)]
        program = [EMULATOR, "-L", str(root), "-cpu", _EMULATED_AS.get(cpu, cpu), *unset, *settings, str(root / PYTHON)]
        return [*program, *map(str, arguments)]

    def run_python(
        self,
        script: Path,
        *arguments: str | Path,
        cpu: str = "cortex-a76",
        timeout: float = 300,
        environment: Mapping[str, str] | None = None,
        runtime_only: bool = False,
        path: Sequence[Path] = (PROJECT,),
    ) -> subprocess.CompletedProcess[str]:
        """Runs a Python script on the board to its end and returns its exit code and what it wrote.

        Args:
            script: a file of this machine.
            timeout: seconds; ``import tvm`` alone takes about 8 with the compiler and 3 without.
            runtime_only: TVM's runtime without the compiler, as on a device.
            path: folders for ``PYTHONPATH``; by default this project, so that ``tvm_hquant.runtime`` is found.

        Raises:
            subprocess.TimeoutExpired: it took longer; the process has been ended.
        """
        variables = {**(environment or {}), **(RUNTIME_ONLY if runtime_only else {})}
        command = self.command(script, *arguments, cpu=cpu, environment=variables, path=path)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    @contextmanager
    def start_rpc_server(
        self, cpu: str = "cortex-a76", timeout: float = 120, path: Sequence[Path] = ()
    ) -> Iterator[RpcServer]:
        """TVM's RPC server on the board, on a free port of this machine's loopback interface, while the context is open.

        It has TVM's runtime without the compiler, as on a device.

        Raises:
            RuntimeError: the server has not come up within ``timeout`` seconds; the message holds what it wrote.
        """
        with TemporaryDirectory(prefix="hquant-board-") as folder:
            # The server starts its sessions with sys.executable, a program of the board: a script runs it emulated.
            python = Path(folder) / "python"
            emulated = shlex.join(self.command(cpu=cpu, environment=RUNTIME_ONLY, path=path))
            python.write_text(f'#!/bin/sh\nexec {emulated} "$@"\n', encoding="utf-8")
            python.chmod(0o755)
            ready, log = Path(folder) / "port", Path(folder) / "log"
            serve = Path(__file__).with_name("serve_rpc.py")
            with log.open("w", encoding="utf-8") as stream:
                process = subprocess.Popen(
                    self.command(serve, python, ready, cpu=cpu, environment=RUNTIME_ONLY, path=path),
                    cwd=folder,
                    stdin=subprocess.PIPE,  # its end, on every way out of this process, ends the server
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
            try:
                yield RpcServer("127.0.0.1", _wait_for_port(process, ready, log, timeout))
            finally:
                _end(process)


def find_board() -> Board:
    """The board of this machine.

    Raises:
        BoardMissingError: the emulator, the cross compiler or the board's files are not there, or the files are outdated.
    """
    for program, package in ((EMULATOR, "qemu-user"), (CROSS_COMPILER, "gcc-aarch64-linux-gnu")):
        if shutil.which(program) is None:
            raise BoardMissingError(f"{program} is not installed (Debian package {package})")
    folder = board_folder()
    found, wanted = Marker.read(folder), Marker.wanted()
    how = "run 'python tests/emulated_board/build_board.py'"
    if found is None:
        raise BoardMissingError(f"no emulated board in {folder}: {how}")
    if found != wanted:
        raise BoardMissingError(f"the emulated board in {folder} is outdated ({found}, wanted {wanted}): {how}")
    return Board(folder)


def board_folder() -> Path:
    """Where the board is kept: ``$HQUANT_BOARD``, else ``~/.cache/tvm_hquant-board``."""
    chosen = os.environ.get("HQUANT_BOARD")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache" / "tvm_hquant-board"


def tvm_target(cpu: str = "cortex-a76") -> Any:
    """TVM's target for code that runs on the board."""
    from tvm.target import Target

    features = list(TARGET_FEATURES[cpu])
    return Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": cpu, "mattr": features})


def export_for_board(executable: Any, path: Path) -> Path:
    """Writes what ``tvm.compile`` returned as a shared library for the board."""
    from tvm.support import cc

    executable.export_library(str(path), fcompile=cc.cross_compiler(CROSS_COMPILER))
    return path


def _host_only_variables() -> set[str]:
    """Variables of this process that would mislead the board's Python or loader."""
    prefixes = ("PYTHON", "LD_", "TVM_")
    return {name for name in os.environ if name.startswith(prefixes)} | ({"VIRTUAL_ENV"} & set(os.environ))


def _wait_for_port(process: subprocess.Popen[bytes], ready: Path, log: Path, timeout: float) -> int:
    """The port that the server writes into a file once it listens."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if ready.exists():
            return int(ready.read_text(encoding="utf-8"))
        time.sleep(0.05)
    reason = "has not come up in time" if process.poll() is None else f"ended with exit code {process.returncode}"
    raise RuntimeError(f"the board's RPC server {reason}:\n{log.read_text(encoding='utf-8')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the server: by closing its standard input, by force if that does not do."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        print("the board's RPC server had to be ended by force", file=sys.stderr)
        process.kill()
        process.wait()
