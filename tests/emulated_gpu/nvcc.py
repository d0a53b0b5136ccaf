"""Stands for nvcc: makes a library for this machine's CPU of CUDA source, and writes the library's path as machine code.

    nvcc.py [options of nvcc] -o BINARY SOURCE

The library, ``SOURCE``'s hash in its name, goes to the folder ``$EMULATED_GPU_LIBRARIES``. For every kernel it has a
function ``emulate_<kernel>(dimensions, arguments)`` that runs all threads of a grid one after the other.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+\) (\w+)\(([^)]*)\) \{')
BETWEEN_THREADS = re.compile(r"__shared__|__sync\w+|__shfl\w*|atomic\w+|\bwarpSize\b")
LOOPS = """
extern "C" void emulate_{name}(const unsigned *n, void **a) {{
  for (blockIdx.z = 0; blockIdx.z < n[2]; ++blockIdx.z)
  for (blockIdx.y = 0; blockIdx.y < n[1]; ++blockIdx.y)
  for (blockIdx.x = 0; blockIdx.x < n[0]; ++blockIdx.x)
  for (threadIdx.z = 0; threadIdx.z < n[5]; ++threadIdx.z)
  for (threadIdx.y = 0; threadIdx.y < n[4]; ++threadIdx.y)
  for (threadIdx.x = 0; threadIdx.x < n[3]; ++threadIdx.x)
    {name}({arguments});
}}
"""


def loops(name: str, parameters: str) -> str:
    """The function that runs a grid of one kernel, of its name and its parameters in C."""
    types = [re.sub(r"\w+$", "", p.replace("__restrict__", "")).strip() for p in parameters.split(",")]
    arguments = ", ".join(f"*({t} *)a[{i}]" for i, t in enumerate(types))
    return LOOPS.format(name=name, arguments=arguments)


def main() -> None:
    """Exits with 1 where kernels cannot run thread after thread, or g++ refuses them."""
    binary, code = Path(sys.argv[-2]), Path(sys.argv[-1])
    source = code.read_text(encoding="utf-8")
    if found := BETWEEN_THREADS.search(source):
        raise SystemExit(f"error: the emulated GPU runs thread after thread, the source has {found[0]}")
    kernels = KERNEL.findall(source)
    if len(kernels) != len(re.findall(r"__global__ void.*\{", source)):
        raise SystemExit("error: a kernel is written in an unknown form")
    source += "".join(loops(name, parameters) for name, parameters in kernels)
    folder = Path(os.environ["EMULATED_GPU_LIBRARIES"])
    library = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
    emulated = library.with_suffix(".cpp")
    emulated.write_text(source, encoding="utf-8")
    include = Path(__file__).with_name("include")
    options = [
        "-O1",
        "-std=c++17",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-w",
        "-shared",
        "-fPIC",
        f"-I{include}",
    ]
    subprocess.run(["g++", *options, str(emulated), "-o", str(library)], check=True)
    binary.write_bytes(str(library).encode() + b"\0")


if __name__ == "__main__":
    main()
