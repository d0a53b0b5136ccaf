"""Runs on the emulated board: ``run_counted.py ARTIFACT INPUTS.npz PLACE`` runs an artifact once.

PLACE gets the address from which the library was loaded.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from tvm_hquant.runtime import load_artifact

folder, inputs, place = map(Path, sys.argv[1:])
artifact = load_artifact(folder)
with np.load(inputs) as archive:
    artifact.run({name: archive[name] for name in archive.files})
lines = [
    line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(artifact.manifest["library"])
]
place.write_text(str(min(int(re.split(r"\W", line)[0], 16) for line in lines)))
