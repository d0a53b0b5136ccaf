"""A small trained network with its data, so that everything can be tried without anything else.

The network tells apart scikit-learn's handwritten digits (``benchmarks/train_quickstart_model.py`` makes all three
files): input ``input`` float32 [N, 1, 8, 8] from 0 to 1, output ``logits`` float32 [N, 10].
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def model_path() -> Path:
    """The ONNX file of the network."""
    return _path("digits.onnx")


def calibration_path() -> Path:
    """256 images that the network was trained on: arrays ``input`` float32 [256, 1, 8, 8], ``labels`` int64 [256]."""
    return _path("digits-calibration.npz")


def evaluation_path() -> Path:
    """539 images that it was never trained on: arrays ``input`` float32 [539, 1, 8, 8], ``labels`` int64 [539]."""
    return _path("digits-evaluation.npz")


def _path(name: str) -> Path:
    # pip always unpacks wheels, so the resource is a file.
    return Path(str(files(__name__).joinpath(name)))
