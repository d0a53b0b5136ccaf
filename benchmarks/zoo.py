"""A folder of trained networks with labelled data, as benchmarks and tests read it.

The folder, named by ``HQUANT_ZOO`` (default: ``../shared/zoo`` beside the repository), holds ``models/*.onnx``, ``data/*.npz``
with arrays ``x_calib…``, ``x_eval…`` and ``y_…``, ``manifest.json`` that says which data and preprocessing a model takes, and
``eval_float.py`` whose ``prep`` does that preprocessing.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvm_hquant.calibration.samples import Sample

Array = npt.NDArray[Any]

ROOT = Path(__file__).resolve().parent.parent


def zoo_folder() -> Path:
    """Where the zoo is; it may not exist."""
    return Path(os.environ.get("HQUANT_ZOO", ROOT.parent / "shared" / "zoo"))


def zoo_models() -> list[str]:
    """Names of the networks in the zoo; empty where there is none."""
    manifest = zoo_folder() / "manifest.json"
    return sorted(json.loads(manifest.read_text())) if manifest.exists() else []


@dataclass(frozen=True, eq=False)
class ZooSource:
    """Samples of one array of the zoo, preprocessed as they are read (a ``DataSource``)."""

    name: str
    configuration: dict[str, Any]
    images: Array
    labels: Array | None
    prepare: Any
    indices: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.indices)

    @property
    def has_labels(self) -> bool:
        return self.labels is not None

    def __iter__(self) -> Iterator[Sample]:
        offset = int(self.configuration.get("label_offset", 0))
        for index in self.indices:
            x = self.prepare(self.configuration, self.images[index : index + 1])
            label = None if self.labels is None else int(self.labels[index]) + offset
            yield Sample({"input": np.ascontiguousarray(x, np.float32)}, label)

    def subset(self, indices: Any) -> ZooSource:
        """Some of the samples, by position in this source."""
        chosen = tuple(self.indices[i] for i in indices)
        return ZooSource(self.name, self.configuration, self.images, self.labels, self.prepare, chosen)


@dataclass(frozen=True)
class ZooModel:
    """One network with its data."""

    name: str

    @property
    def title(self) -> str:
        """The name without the ending of the file."""
        return self.name.removesuffix(".onnx")

    @property
    def path(self) -> Path:
        return zoo_folder() / "models" / self.name

    @cached_property
    def configuration(self) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads((zoo_folder() / "manifest.json").read_text())[self.name]
        return entry

    def source(self, split: str) -> ZooSource:
        """The array ``x_<split>`` with its labels, such as ``eval`` or ``calib_jpeg``."""
        with np.load(zoo_folder() / "data" / f"{self.configuration['data']}.npz") as data:
            images = data[f"x_{split}"]
            labels = data[f"y_{split}"] if f"y_{split}" in data.files else None
        everything = tuple(range(len(images)))
        return ZooSource(f"{self.name} {split}", self.configuration, images, labels, _prepare(), everything)

    def splits(self) -> list[str]:
        """Names of the arrays that there are."""
        with np.load(zoo_folder() / "data" / f"{self.configuration['data']}.npz") as data:
            return [key[2:] for key in data.files if key.startswith("x_")]

    def calibration(self) -> ZooSource:
        """Calibration samples: the JPEG ones for networks trained on those."""
        names = self.splits()
        trained_on_jpeg = self.name in ("cifar10_resnet50.onnx", "cifar10_googlenet.onnx", "cifar10_shufflenetv1.onnx")
        return self.source("calib_jpeg" if trained_on_jpeg and "calib_jpeg" in names else "calib")

    def evaluation(self) -> ZooSource:
        """Evaluation samples: the larger set where there are two."""
        return self.source("eval_jpeg" if "eval_jpeg" in self.splits() else "eval")


def _prepare() -> Any:
    specification = importlib.util.spec_from_file_location("zoo_eval_float", zoo_folder() / "eval_float.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.prep
