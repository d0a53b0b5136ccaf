"""Hands artifacts to the emulated board, runs them there with the project's runtime, and brings the outputs back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.emulated_board.board import Board
from tvm_hquant.runtime import Artifact

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Job:
    """One artifact to run: ``inputs`` maps each input's name to an array whose first axis counts samples."""

    name: str
    artifact: Artifact
    inputs: Mapping[str, Array]


@dataclass(frozen=True)
class BoardResults:
    """What the board gave.

    Attributes:
        outputs: per job that ran, each output's name to its array.
        refusals: per job that did not, the class and message of the project's error.
        modules: modules of this project that were imported on the board.
    """

    outputs: Mapping[str, Mapping[str, Array]]
    refusals: Mapping[str, str]
    modules: tuple[str, ...]


def run_artifacts(board: Board, cpu: str, jobs: Sequence[Job], folder: Path, timeout: float = 600) -> BoardResults:
    """Runs artifacts in one process of the board, under TVM's runtime library without the compiler.

    Args:
        cpu: a CPU of the board.
        jobs: their names become names of folders.
        folder: an empty folder for the files that go there and back.
        timeout: seconds for all jobs.

    Raises:
        RuntimeError: the process on the board failed; the message holds what it wrote.
    """
    for job in jobs:
        (folder / job.name).mkdir(parents=True)
        job.artifact.save(folder / job.name / "artifact")
        np.savez(folder / job.name / "inputs.npz", allow_pickle=False, **job.inputs)
    script = Path(__file__).with_name("run_artifacts.py")
    result = board.run_python(script, folder, cpu=cpu, timeout=timeout, runtime_only=True)
    if result.returncode != 0:
        raise RuntimeError(f"the board's process ended with exit code {result.returncode}:\n{result.stderr}")
    outputs: dict[str, Mapping[str, Array]] = {}
    refusals: dict[str, str] = {}
    for job in jobs:
        refusal = folder / job.name / "error.txt"
        if refusal.exists():
            refusals[job.name] = refusal.read_text(encoding="utf-8")
            continue
        with np.load(folder / job.name / "outputs.npz") as archive:
            outputs[job.name] = {name: archive[name] for name in archive.files}
    return BoardResults(outputs, refusals, tuple((folder / "modules.txt").read_text(encoding="utf-8").split()))
