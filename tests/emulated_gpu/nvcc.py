"""Stands for nvcc: makes a library for this machine's CPU of CUDA source, and writes the library's path as machine code.

    nvcc.py [options of nvcc] -o BINARY SOURCE

The library, ``SOURCE``'s hash in its name, goes to the folder ``$EMULATED_GPU_LIBRARIES``. For every kernel it has a
function ``emulate_<kernel>(dimensions, arguments)`` that runs all threads of a grid one after the other. Instructions of PTX
become calls of functions of ``include/threads.h``; at one that a warp executes together, its threads wait for each other.
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
ASSEMBLY = re.compile(r"\basm volatile\((.*?)\);", re.DOTALL)
OPERAND = re.compile(r'"\+?[rf]"\(([^()]*)\)')
LOOPS = """
extern "C" void emulate_{name}(const unsigned *n, void **a) {{
  for (blockIdx.z = 0; blockIdx.z < n[2]; ++blockIdx.z)
  for (blockIdx.y = 0; blockIdx.y < n[1]; ++blockIdx.y)
  for (blockIdx.x = 0; blockIdx.x < n[0]; ++blockIdx.x)
    emulate_block(n + 3, [&] {{ {name}({arguments}); }});
}}
"""


def loops(name: str, parameters: str) -> str:
    """The function that runs a grid of one kernel, of its name and its parameters in C."""
    types = [re.sub(r"\w+$", "", p.replace("__restrict__", "")).strip() for p in parameters.split(",")]
    arguments = ", ".join(f"*({t} *)a[{i}]" for i, t in enumerate(types))
    return LOOPS.format(name=name, arguments=arguments)


def without_assembly(source: str) -> str:
    """The source with every instruction of PTX as a call of the function of its name, dots replaced.

    Raises:
        SystemExit: several instructions in one statement, or operands that are not 32-bit registers.
    """

    def call(statement: re.Match[str]) -> str:
        text, _, operands = statement[1].partition(":")
        instruction = re.match(r'\s*"([\w.]+) ', text)
        names = OPERAND.findall(operands)
        if instruction is None or text.count(";") != 1 or len(names) != operands.count('"') // 2:
            raise SystemExit(f"error: the emulated GPU does not know this assembly: {statement[0]}")
        return f"emulate_{instruction[1].replace('.', '_')}({', '.join(names)});"

    return ASSEMBLY.sub(call, source)


def main() -> None:
    """Exits with 1 where kernels cannot run thread after thread, or g++ refuses them."""
    binary, code = Path(sys.argv[-2]), Path(sys.argv[-1])
    source = code.read_text(encoding="utf-8")
    if found := BETWEEN_THREADS.search(source):
        raise SystemExit(f"error: the emulated GPU runs thread after thread, the source has {found[0]}")
    kernels = KERNEL.findall(source)
    if len(kernels) != len(re.findall(r"__global__ void.*\{", source)):
        raise SystemExit("error: a kernel is written in an unknown form")
    source = '#include "threads.h"\n' + without_assembly(source)
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
