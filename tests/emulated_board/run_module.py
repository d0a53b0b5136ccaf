"""Runs on the board: ``run_module.py LIBRARY INPUTS OUTPUT`` calls a Relax module's ``main`` with TVM's runtime alone.

INPUTS: an ``.npz`` whose arrays, in order, are the arguments. OUTPUT: the ``.npy`` that gets the result.
"""

from __future__ import annotations

import sys

import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

library, inputs, output = sys.argv[1:]
machine = VirtualMachine(tvm.runtime.load_module(library), tvm.cpu())
arrays = np.load(inputs)
result = machine["main"](*(tvm.runtime.tensor(arrays[name]) for name in arrays.files))
np.save(output, result.numpy())
