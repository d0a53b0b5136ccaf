"""Loads an artifact and runs it, with TVM's runtime alone.

This module imports nothing of the compiler: it works where only TVM's runtime library is installed
(``TVM_USE_RUNTIME_LIB=1``), needs neither onnx nor the rest of this package, and may be copied to a board beside
``errors.py``, ``cpu_features.py``, ``mapped_library.py``, ``stored_weights.py`` and ``bfloat16.py``, which import nothing but
NumPy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.cpu_features import cpu_features
from tvm_hquant.errors import ArtifactError, DataError
from tvm_hquant.mapped_library import release_pages
from tvm_hquant.stored_weights import restored

Array = npt.NDArray[Any]

MANIFEST_VERSION = 2
LIBRARY_NAME = "model.so"
PACKED_WEIGHTS_NAME = "weights.bin"
_TENSOR_ALIGNMENT = 64
"""Bytes that TVM's kernels want tensors to be aligned to."""
_FIELDS = {"inputs": list, "outputs": list, "target": dict, "library": str}


def use_all_cores() -> None:
    """Gives TVM's thread pool one thread per core that this process may use, unless ``TVM_NUM_THREADS`` is set.

    It has to happen before the first kernel runs.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("TVM_NUM_THREADS", str(cores))


def _load_library(path: Path) -> Any:
    """Loads a library under a name that none had before.

    The dynamic loader goes by names: asked for a file that took the place of one that this process has loaded, it gives the
    old one. ``tvm.runtime.load_module`` replaces a link by what it names, ``tvm_ffi.load_module`` does not.
    """
    import tvm_ffi

    with tempfile.TemporaryDirectory(prefix="tvm_hquant_") as folder:
        link = Path(folder) / path.name
        link.symlink_to(path.resolve())
        return tvm_ffi.load_module(link)


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        ArtifactError: the folder or its manifest is missing or cannot be read.
    """
    path = Path(folder) / "manifest.json"
    if Path(folder).is_file():
        raise ArtifactError(f"{folder} is not an artifact but a file: give the folder that 'hquant compile' wrote")
    if not Path(folder).is_dir():
        raise ArtifactError(
            f"{folder} is not an artifact: there is no such folder; 'hquant compile … -o {folder}' makes it"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{folder} is not an artifact: cannot read manifest.json ({error.strerror})") from None
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}; compile the model again") from None
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
        raise ArtifactError(f"{path} has version {manifest.get('version') if isinstance(manifest, dict) else None!r}, "
                            f"this release reads {MANIFEST_VERSION}; compile the model again")  # fmt: skip
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(manifest.get(name), kind)]
    if wrong:
        raise ArtifactError(f"{path} is damaged: {', '.join(wrong)} missing or wrong; compile the model again")
    return manifest


def check_machine(manifest: Mapping[str, Any]) -> None:
    """Makes sure that this machine can run an artifact.

    Raises:
        ArtifactError: it is for another architecture, or for instructions that this CPU does not have.
    """
    target = manifest["target"]
    machine = os.uname().machine
    if target["machine"] not in ("", machine):
        raise ArtifactError(
            f"the artifact is for {target['name']} ({target['machine']}), this machine is {machine}: copy it to the "
            "target, or compile the model with '--target host'"
        )
    missing = sorted(set(target["required_cpu_features"]) - cpu_features())
    if missing:
        raise ArtifactError(
            f"the artifact for {target['name']} needs instructions that this CPU does not have "
            f"({', '.join(missing)}): run it on its target, or compile the model with '--target host'"
        )


class Artifact:
    """A compiled model in a folder: ``run({input name: array}) → {output name: array}``.

    The library is loaded at the first run, so that an artifact for another machine can be made, saved and inspected here.

    Attributes:
        folder: where its files are.
        manifest: what ``manifest.json`` says.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._inputs = {e["name"]: (tuple(e["shape"]), str(e["dtype"])) for e in manifest["inputs"]}
        self._outputs = [str(e["name"]) for e in manifest["outputs"]]
        self._kept_inputs: dict[str, tuple[Any, Array]] = {}

    @cached_property
    def library(self) -> Any:
        """The compiled library, loaded by TVM's runtime.

        Raises:
            ArtifactError: this machine cannot run it, or the file is missing or damaged.
        """
        check_machine(self.manifest)
        # The loader maps a library into memory: one that is cut short would end the process when it runs.
        path = self._checked_file(self.manifest["library"])
        use_all_cores()
        import tvm

        if self.manifest["target"]["device"] == "cuda" and not tvm.cuda().exist:
            raise ArtifactError(
                f"the artifact for {self.manifest['target']['name']} needs an NVIDIA GPU, and TVM finds none on this machine: "
                "run it on its target (with the driver installed), or compile the model with '--target host'"
            )
        try:
            return _load_library(path)
        except (RuntimeError, OSError) as error:
            raise ArtifactError(f"cannot load {path}: {str(error).strip().splitlines()[-1]}") from None

    def _checked_file(self, name: str) -> Path:
        """The path of a file of the artifact that is there and whole."""
        path = self.folder / name
        if not path.is_file():
            raise ArtifactError(f"{self.folder} is incomplete: {name} is missing; compile the model again")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.manifest.get("files", {}).get(name, found):
            raise ArtifactError(f"cannot load {path}: it is damaged, or another file than manifest.json has the SHA-256 "
                                "of; copy or compile it again")  # fmt: skip
        return path

    def packed_weights(self) -> dict[str, Array]:
        """Weights that the library does not hold, as their layers' kernels read them, in the order of its parameters.

        Raises:
            ArtifactError: their file is missing or damaged.
        """
        records = self.manifest.get("packed_weights", [])
        if not records:
            return {}
        data = self._checked_file(PACKED_WEIGHTS_NAME).read_bytes()
        arrays, start = {}, 0
        try:
            for record in records:
                end = start + int(record["bytes"])
                arrays[str(record["layer"])] = restored(record, data[start:end]).array()
                start = end
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{self.folder / PACKED_WEIGHTS_NAME} does not fit manifest.json ({error}); compile the model again"
            ) from None
        return arrays

    @cached_property
    def parameters(self) -> tuple[Any, ...]:
        """What ``main`` of the library takes behind the inputs: the packed weights, on the device."""
        import tvm

        return tuple(tvm.runtime.tensor(array, self.device) for array in self.packed_weights().values())

    @cached_property
    def device(self) -> Any:
        """TVM's device on which the artifact runs."""
        import tvm

        return tvm.cuda() if self.manifest["target"]["device"] == "cuda" else tvm.cpu()

    @cached_property
    def machine(self) -> Any:
        """TVM's virtual machine with the library in it."""
        library = self.library
        from tvm.runtime.vm import VirtualMachine

        machine = VirtualMachine(library, self.device)
        release_pages(self.folder / self.manifest["library"])
        return machine

    @cached_property
    def _main(self) -> Any:
        return self.machine["main"]

    def save(self, path: Path | str) -> Artifact:
        """Writes the artifact to a folder: aside first, then renamed, so that no half-written one is ever there.

        An artifact that stands there already is replaced.

        Raises:
            ArtifactError: the folder holds something else, or cannot be written.
        """
        target = Path(os.path.abspath(path))
        check_destination(target)
        if target.resolve() == self.folder.resolve():
            return self
        aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            aside.mkdir()
            for file in self.folder.iterdir():
                shutil.copy2(file, aside / file.name)
            if target.exists():
                target.rename(old)
            aside.rename(target)
        except OSError as error:
            raise ArtifactError(f"cannot write the artifact {path}: {error.strerror or error}") from None
        finally:
            if old.exists() and not target.exists():
                old.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return Artifact(target, self.manifest)

    def run(self, inputs: Mapping[str, Array] | Array) -> dict[str, Array]:
        """Outputs for any number of samples.

        ``inputs`` maps the name of each input to an array whose first axis counts samples; a single array serves a model
        with one input.

        Raises:
            DataError: a name, shape or dtype does not fit, the numbers of samples differ, or there are none.
        """
        arrays = self.checked_inputs(inputs)
        batch = next(iter(self._inputs.values()))[0][0]
        count = len(next(iter(arrays.values())))
        if count == batch:
            return dict(zip(self._outputs, self._call(arrays), strict=True))
        parts: list[Sequence[Array]] = []
        for start in range(0, count, batch):
            chunk = {name: _padded(a[start : start + batch], batch) for name, a in arrays.items()}
            parts.append([o[: min(batch, count - start)] for o in self._call(chunk)])
        return {name: np.concatenate(o) for name, o in zip(self._outputs, zip(*parts, strict=True), strict=True)}

    def time(self, inputs: Mapping[str, Array] | Array, repeat: int = 10) -> list[float]:
        """Seconds of ``repeat`` warm calls on the first samples of ``inputs``, measured on the device by TVM."""
        arrays = self.checked_inputs(inputs)
        batch = next(iter(self._inputs.values()))[0][0]
        tensors = [self._tensor(name, _padded(a[:batch], batch)) for name, a in arrays.items()]
        tensors += self.parameters
        self._main(*tensors)
        evaluator = self.machine.time_evaluator("main", self.device, number=1, repeat=repeat)
        return [float(t) for t in evaluator(*tensors).results]

    def _call(self, arrays: Mapping[str, Array]) -> list[Array]:
        result = self._main(*(self._tensor(name, arrays[name]) for name in self._inputs), *self.parameters)
        return [result.numpy()] if hasattr(result, "numpy") else [r.numpy() for r in result]

    def _tensor(self, name: str, array: Array) -> Any:
        """An input where the device can read it: the array's own memory if it is aligned, else memory that is kept."""
        import tvm

        if self.manifest["target"]["device"] != "cpu":
            return tvm.runtime.tensor(np.ascontiguousarray(array), self.device)
        if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % _TENSOR_ALIGNMENT == 0:
            return tvm.runtime.from_dlpack(array)
        if name not in self._kept_inputs:
            tensor = tvm.runtime.empty(array.shape, str(array.dtype), self.device)
            self._kept_inputs[name] = tensor, np.from_dlpack(tensor)
        tensor, view = self._kept_inputs[name]
        np.copyto(view, array)
        return tensor

    def checked_inputs(self, inputs: Mapping[str, Array] | Array) -> dict[str, Array]:
        """Inputs as :meth:`run` takes them, in the order and the dtypes of the model's own.

        Raises:
            DataError: as :meth:`run`.
        """
        if not isinstance(inputs, Mapping):
            if len(self._inputs) != 1:
                raise DataError(
                    f"the model has {len(self._inputs)} inputs ({', '.join(self._inputs)}): give them by name"
                )
            inputs = {next(iter(self._inputs)): np.asarray(inputs)}
        unknown = sorted(set(inputs) - set(self._inputs) - {"labels"})
        missing = sorted(set(self._inputs) - set(inputs))
        if unknown or missing:
            raise DataError(
                f"the model's inputs are {', '.join(self._inputs)}"
                + (f"; {', '.join(missing)} is missing" if missing else "")
                + (f"; {', '.join(unknown)} is unknown" if unknown else "")
            )
        arrays: dict[str, Array] = {}
        for name, (shape, dtype) in self._inputs.items():
            array = np.asarray(inputs[name])
            if array.shape[1:] != shape[1:] or array.ndim != len(shape):
                wanted = "×".join(map(str, ("samples", *shape[1:])))
                raise DataError(f"input {name} has shape {'×'.join(map(str, array.shape))}, expected {wanted}")
            if array.dtype != dtype and not np.can_cast(array.dtype, dtype, "safe"):
                raise DataError(f"input {name} is {array.dtype}, expected {dtype}: convert it with .astype({dtype!r})")
            arrays[name] = np.asarray(array, dtype)
        counts = {len(a) for a in arrays.values()}
        if counts == {0}:
            raise DataError("the inputs hold no samples: give at least one")
        if len(counts) > 1:
            raise DataError(f"the inputs hold different numbers of samples: {sorted(counts)}")
        return arrays


def load_artifact(folder: Path | str) -> Artifact:
    """Loads an artifact for this machine.

    Raises:
        ArtifactError: it is incomplete or damaged, or this machine cannot run it.
    """
    artifact = Artifact(Path(folder), read_manifest(folder))
    artifact.library  # noqa: B018 - loads it, so that errors show here
    artifact.parameters  # noqa: B018
    return artifact


def check_destination(target: Path) -> None:
    """Makes sure that an artifact may be written to a folder.

    Raises:
        ArtifactError: something else stands there, or the folder around it is not writable.
    """
    check_folder(target, "artifact")
    if target.is_dir() and any(target.iterdir()) and not (target / "manifest.json").exists():
        raise ArtifactError(f"{target} is a folder with other files in it: give a new folder for the artifact")


def check_folder(target: Path, what: str) -> None:
    """Makes sure that a folder is there or can be made; ``what`` is to be written into it.

    Raises:
        ArtifactError: a file stands there, or the folder around it is not writable.
    """
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{target} is a file: give a folder for the {what}")
    parent = next(p for p in Path(os.path.abspath(target)).parents if p.exists())
    if not parent.is_dir():
        raise ArtifactError(f"cannot write the {what} {target}: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write the {what} {target}: the folder {parent} is not writable")


def _padded(array: Array, batch: int) -> Array:
    if len(array) == batch:
        return array
    return np.concatenate([array, np.repeat(array[-1:], batch - len(array), axis=0)])
