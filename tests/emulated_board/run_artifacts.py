"""Runs on the board: ``run_artifacts.py FOLDER`` runs every artifact of a folder, with ``tvm_hquant.runtime`` alone.

Each subfolder of FOLDER holds ``artifact/`` and ``inputs.npz`` and gets ``outputs.npz``, or ``error.txt`` with the reason
why the runtime refused the artifact. FOLDER gets ``modules.txt``, the modules of this project that were imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from tvm_hquant.errors import HQuantError
from tvm_hquant.runtime import load_artifact

folder = Path(sys.argv[1])
for job in sorted(path for path in folder.iterdir() if path.is_dir()):
    with np.load(job / "inputs.npz") as archive:
        inputs = {name: archive[name] for name in archive.files}
    try:
        outputs = load_artifact(job / "artifact").run(inputs)
    except HQuantError as error:
        (job / "error.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
    else:
        np.savez(job / "outputs.npz", allow_pickle=False, **outputs)
imported = sorted(name for name in sys.modules if name.partition(".")[0] == "tvm_hquant")
(folder / "modules.txt").write_text("\n".join(imported), encoding="utf-8")
