"""Runs on the emulated board: calls every kernel of a library on given arguments and stores what it gives.

Usage: run_kernels_on_board.py LIBRARY ARGUMENTS.npz OUTPUTS.npz. Arguments are named ``{kernel}/{position}``, the last one of
each kernel being its output.
"""

from __future__ import annotations

import sys

import numpy as np
import tvm

library = tvm.runtime.load_module(sys.argv[1])
kernels: dict[str, dict[int, object]] = {}
with np.load(sys.argv[2]) as arrays:
    for key in arrays.files:
        name, position = key.split("/")
        kernels.setdefault(name, {})[int(position)] = tvm.runtime.tensor(arrays[key])
outputs = {}
for name, arguments in kernels.items():
    ordered = [arguments[i] for i in range(len(arguments))]
    library[name](*ordered)
    outputs[name] = ordered[-1].numpy()
np.savez(sys.argv[3], **outputs)
