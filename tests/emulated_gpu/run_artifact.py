"""Runs with the emulated driver: ``run_artifact.py ARTIFACT INPUTS OUTPUTS`` runs an artifact on arrays of an ``.npz``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tvm_hquant.runtime import load_artifact

folder, inputs, outputs = map(Path, sys.argv[1:])
with np.load(inputs) as archive:
    arrays = {name: archive[name] for name in archive.files}
artifact = load_artifact(folder)
assert artifact.device.dlpack_device_type() == 2, "a CUDA device is asked for"
np.savez(outputs, allow_pickle=False, **artifact.run(arrays))
