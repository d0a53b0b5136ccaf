"""The emulated GPU: builds the stand-ins for nvcc and the driver, and runs artifacts with them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

Array = npt.NDArray[Any]

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
VERSIONS = "libcudart.so.13 { cuda*; };\n"
"""TVM's CUDA runtime asks for the symbols of this version."""


class GpuMissingError(Exception):
    """The GPU cannot be emulated here; the message says why."""


@dataclass(frozen=True)
class EmulatedGpu:
    """Attributes:
    home: for ``CUDA_HOME``: holds ``bin/nvcc``.
    libraries: for ``LD_LIBRARY_PATH``: holds driver and runtime library.
    kernels: for ``EMULATED_GPU_LIBRARIES``: gets the compiled kernels.
    """

    home: Path
    libraries: Path
    kernels: Path

    def run(self, artifact: Path, inputs: Mapping[str, Array], folder: Path) -> dict[str, Array]:
        """Outputs of an artifact, which another process runs with TVM's CUDA runtime and the emulated driver.

        Raises:
            RuntimeError: the process failed; the message holds what it wrote.
        """
        np.savez(folder / "inputs.npz", allow_pickle=False, **inputs)
        command = [FOLDER / "run_artifact.py", artifact, folder / "inputs.npz", folder / "outputs.npz"]
        result = self._python(*command)
        if result.returncode != 0:
            raise RuntimeError(f"the process ended with exit code {result.returncode}:\n{result.stderr}")
        with np.load(folder / "outputs.npz") as archive:
            return {name: archive[name] for name in archive.files}

    def hquant(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """The command ``hquant``, run where the emulated driver is the machine's."""
        return self._python("-m", "tvm_hquant.cli.main", *arguments)

    def _python(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        variables = {**os.environ, "LD_LIBRARY_PATH": str(self.libraries), "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)


def build_gpu(folder: Path) -> EmulatedGpu:
    """Compiles the driver and writes the program ``nvcc``.

    Raises:
        GpuMissingError: no C compiler, or a TVM without its CUDA runtime.
    """
    if shutil.which("gcc") is None or shutil.which("g++") is None:
        raise GpuMissingError("the emulated GPU needs gcc and g++")
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise GpuMissingError("the emulated GPU runs on x86-64 Linux")
    if not (Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so").exists():
        raise GpuMissingError("this TVM comes without libtvm_runtime_cuda.so")
    gpu = EmulatedGpu(folder / "home", folder / "libraries", folder / "kernels")
    for path in (gpu.home / "bin", gpu.libraries, gpu.kernels):
        path.mkdir(parents=True)
    nvcc = gpu.home / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(FOLDER / "nvcc.py")])} "$@"\n', encoding="utf-8")
    nvcc.chmod(0o755)
    versions = folder / "versions.map"
    versions.write_text(VERSIONS, encoding="utf-8")
    compile_library = ["gcc", "-shared", "-fPIC", "-O1", "-w", str(FOLDER / "driver.c"), "-ldl"]
    for name, options in (
        ("libcuda.so.1", []),
        ("libcudart.so.13", [f"-Wl,--version-script={versions}"]),
    ):
        output = ["-o", str(gpu.libraries / name), f"-Wl,-soname,{name}"]
        subprocess.run([*compile_library, *options, *output], check=True)
    return gpu
