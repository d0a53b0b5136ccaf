"""Inner loops of the AArch64 kernels, counted by LLVM's machine code analyser where no Arm core is at hand to time them.

    apt install llvm-19
    python -m benchmarks.arm_inner_loops                       # all cores, a8w8
    python -m benchmarks.arm_inner_loops --cores cortex-a53 --precision a8w5

Typical layers are compiled for each core, the innermost loop with the most multiply-adds is cut out of the assembly, and
``llvm-mca`` says how many cycles an iteration takes on its model of the core, loads hitting the first-level cache.

The *peak* is what the same model says of the multiply-adds alone, with the additions that widen their sums: on registers, none
waiting for another. The *bound* is what the busiest part of the core needs for the loop's work: multiply-adds, loads and stores
of activations, weights and outputs, conversions and the epilogue, without moves, stack, addresses and jumps. A part is also a
set of units that share work: of two vector pipes, one of which multiplies, neither may have too much for itself and both too
much together, which ``llvm-mca``'s block reciprocal throughput does not see. Dense layers
with one row load each weight for one product, and depthwise kernels, unrolled over the window, hold the epilogue of nine
products: they cannot come near the peak, but they can come near the bound. Where an instruction multiplies by zeros (a word of
four rows for a window of three), these are no products.

Models of LLVM: the Cortex-A72 is modelled as a Cortex-A57, and the Cortex-A76 less precisely than the Neoverse N1, which
has the same vector units.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import tvm

from tvm_hquant.cli.tables import print_table
from tvm_hquant.kernels.interface import Kernel, KernelRequest, ProvenEnding
from tvm_hquant.kernels.processor import Processor
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.operators import Conv2D, Dense, Epilogue, Window

ANALYSERS = ("llvm-mca-19", "llvm-mca")
TRIPLE = "aarch64-linux-gnu"
ITERATIONS = 200
_WORD_ROWS, _WORD_PRODUCTS = 4, 16
_PEAK_SUMS = 20
"""Independent sums in the peak's loop: more than four pipes with a latency of four cycles hold."""
_PEAK_REGISTERS = 30
SAME = (1, 1, 1, 1)

CORES = {
    "cortex-a53": ("arm_neon",),
    "cortex-a72": ("arm_neon",),
    "cortex-a76": ("arm_dotprod",),
    "neoverse-n1": ("arm_dotprod",),
    "neoverse-n2": ("arm_bf16", "arm_fp16fml", "arm_i8mm"),
    "neoverse-v1": ("arm_bf16", "arm_fp16fml", "arm_i8mm"),
}
"""Cores by LLVM's names, with their kernel families, the best first."""
L1_SETS = {"cortex-a53": 128}
"""Sets of the first-level data cache; 256 where nothing is said."""

LAYERS: dict[str, Conv2D | Dense] = {
    "56×56 64→64 3×3": Conv2D((1, 56, 56, 64), 64, Window((3, 3), padding=SAME)),
    "28×28 128→128 3×3": Conv2D((1, 28, 28, 128), 128, Window((3, 3), padding=SAME)),
    "14×14 256→256 3×3": Conv2D((1, 14, 14, 256), 256, Window((3, 3), padding=SAME)),
    "7×7 512→512 3×3": Conv2D((1, 7, 7, 512), 512, Window((3, 3), padding=SAME)),
    "56×56 64→256 1×1": Conv2D((1, 56, 56, 64), 256, Window((1, 1))),
    "14×14 1024→256 1×1": Conv2D((1, 14, 14, 1024), 256, Window((1, 1))),
    "dense 2048→1000": Dense(1, 2048, 1000),
    "depthwise 56×56×144 3×3": Conv2D((1, 56, 56, 144), 144, Window((3, 3), padding=SAME), groups=144),
    "depthwise 14×14×384 3×3": Conv2D((1, 14, 14, 384), 384, Window((3, 3), padding=SAME), groups=384),
}

CENTRED_PRODUCTS = {"a8w8": 2, "a8w7": 4, "a8w6": 8}
"""What the weights of an integer precision prove (7 and 6 bits: symmetric ones)."""
PRECISIONS = (*CENTRED_PRODUCTS, "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class MultiplyAdd:
    """An instruction that multiplies and adds: its name as a pattern, its products, and how the peak's loop spells it."""

    pattern: str
    products: int
    spelling: str


FORMS = (
    MultiplyAdd(r"u?s?mmla\b", 32, "usmmla v{n}.4s, v30.16b, v31.16b"),
    MultiplyAdd(r"(sdot|sudot|usdot)\b", 16, "sdot v{n}.4s, v30.16b, v31.4b[0]"),
    MultiplyAdd(r"sm(ull|lal)2?\s+v\d+\.8h", 8, "smlal v{n}.8h, v30.8b, v31.8b"),
    MultiplyAdd(r"fml[as]\s+v\d+\.4s", 4, "fmla v{n}.4s, v30.4s, v31.s[0]"),
    MultiplyAdd(r"fmlal2?\s", 4, "fmlal v{n}.4s, v30.4h, v31.4h"),
    MultiplyAdd(r"bfmlal[bt]\s", 4, "bfmlalb v{n}.4s, v30.8h, v31.8h"),
)


_WIDENING = r"(sadalp|saddw2?)\b"
_ADDRESSES = r"(add|sub|subs|cmp|and|orr|lsl|mul|madd|cset|csel|mov|sxtw|uxtw|movi)\s+[xw]|(add|sub)\s+sp"
_NO_WORK = rf"(movi?\s+v|b\.|cb|tb|b\s|{_ADDRESSES})"
"""Instructions that another register allocation, or addresses of another form, would not need."""


@dataclass(frozen=True)
class Loop:
    """The instructions of an innermost loop, and which form of multiply-add does its work."""

    instructions: tuple[str, ...]
    form: MultiplyAdd

    @property
    def products(self) -> int:
        return self.form.products * sum(bool(re.match(self.form.pattern, line)) for line in self.instructions)

    @property
    def on_the_stack(self) -> int:
        """Instructions that read or write the stack: spilled registers."""
        return sum("[sp" in line for line in self.instructions)

    @property
    def work(self) -> tuple[str, ...]:
        """Its instructions without moves, stack, addresses and jumps."""
        return tuple(line for line in self.instructions if "[sp" not in line and not re.match(_NO_WORK, line))

    def peak_loop(self) -> tuple[tuple[str, ...], int]:
        """Multiply-adds of this loop's kind alone, with the widening additions that they need, and their products."""
        sums = [line for line in self.instructions if re.match(_WIDENING, line)]
        count = self.products // self.form.products
        lines = [self.form.spelling.format(n=n) for n in range(_PEAK_SUMS)]
        if sums:
            widened = round(_PEAK_SUMS * len(sums) / count)
            spelling = "sadalp v{n}.4s, v30.8h" if sums[0].startswith("sadalp") else "saddw v{n}.4s, v{n}.4s, v30.4h"
            # There may be more of them than registers are left: sums take turns.
            lines += [spelling.format(n=_PEAK_SUMS + n % (_PEAK_REGISTERS - _PEAK_SUMS)) for n in range(widened)]
        return tuple(lines), _PEAK_SUMS * self.form.products


def request_for(operator: Conv2D | Dense, precision: str) -> KernelRequest:
    """A layer from and to codes whose constants prove what those of most layers with a ReLU do, or floats."""
    if precision not in CENTRED_PRODUCTS:
        # Depthwise layers whose padding is left out have no loop over the rows of the window that could be cut out.
        is_depthwise = isinstance(operator, Conv2D) and operator.is_depthwise
        operator = operator if is_depthwise else replace(operator, epilogue=Epilogue(lower=0.0))
        storage: Any = precision
        return KernelRequest(operator, (storage,), storage, storage, finite_weights=not is_depthwise)
    products, ending = CENTRED_PRODUCTS[precision], ProvenEnding(True, True, True, True)
    return KernelRequest(operator, ("uint8",), "uint8", "int8", centred_products=products, ending=ending)


def assembly(kernel: Kernel, core: str) -> str:
    """What LLVM makes of a kernel for a core."""
    module = tvm.IRModule({"kernel": kernel.function.with_attr("global_symbol", "kernel")})
    target = tvm.target.Target({"kind": "llvm", "mtriple": TRIPLE, "mcpu": core})
    return str(tvm.compile(module, target=target).mod.inspect_source("s"))


def innermost_loop(source: str) -> Loop:
    """The innermost loop with the most products; where LLVM has unrolled all of them, one with jumps ahead inside it."""
    lines = [line.split("//")[0].strip() for line in source.splitlines()]
    labels = {match[1]: index for index, line in enumerate(lines) if (match := re.match(r"(\.LBB\w+):", line))}
    jumps = [
        (labels[jump[1]], index)
        for index, line in enumerate(lines)
        if (jump := re.match(r"(?:b|cb|tb)\S*\s+(?:.*,\s*)?(\.LBB\w+)$", line)) and labels.get(jump[1], index) < index
    ]
    bodies = [
        lines[begin + 1 : end + 1]
        for begin, end in jumps
        if not any(begin <= b and e < end for b, e in jumps if (b, e) != (begin, end))
    ]
    without_labels = [body for body in bodies if not any(line.startswith(".LBB") for line in body)]
    for candidates in (without_labels, bodies):
        codes = [tuple(line for line in body if line and not line.startswith(".")) for body in candidates]
        found = [loop for code in codes for form in FORMS if (loop := Loop(code, form)).products]
        if found:
            # With equal products the shorter loop: a copy of it may stand elsewhere with other work around it.
            return max(found, key=lambda loop: (loop.products, -len(loop.instructions)))
    sys.exit("there is no loop with multiply-adds in a kernel: LLVM has unrolled it in a way that is not foreseen here")


def cycles(instructions: tuple[str, ...], core: str) -> float:
    """Cycles of an iteration on LLVM's model of a core."""
    return _analysed(instructions, core, r"Total Cycles:\s+([\d.]+)") / ITERATIONS


def least_cycles(instructions: tuple[str, ...], core: str) -> float:
    """Cycles that the busiest part of the core needs for an iteration if nothing waits."""
    used = _used_units(instructions, core)
    sets = {frozenset(units) for units in used}
    # What a set of units does is that of instructions which none other may take.
    parts = sets | {a | b for a in sets for b in sets} - {frozenset()}
    shared = (sum(sum(units.values()) for units in used if units.keys() <= part) / len(part) for part in parts)
    return max(_analysed(instructions, core, r"Block RThroughput:\s+([\d.]+)"), *shared)


def _used_units(instructions: tuple[str, ...], core: str) -> list[dict[int, float]]:
    """For each instruction the units of the core that may take it, with the cycles for which it has them, alone."""
    forms = sorted(set(instructions))
    regions = (f"# LLVM-MCA-BEGIN {i}\n{form}\n# LLVM-MCA-END {i}\n" for i, form in enumerate(forms))
    used: dict[str, dict[int, float]] = {}
    for region in json.loads(_analyse("".join(regions), core, "--json"))["CodeRegions"]:
        usage = region["ResourcePressureView"]["ResourcePressureInfo"]
        used[forms[int(region["Name"])]] = {
            entry["ResourceIndex"]: entry["ResourceUsage"] for entry in usage if entry["InstructionIndex"] == 0
        }
    return [used[instruction] for instruction in instructions]


def _analysed(instructions: tuple[str, ...], core: str, pattern: str) -> float:
    number = re.search(pattern, _analyse("\n".join(instructions), core))
    assert number is not None
    return float(number[1])


def _analyse(source: str, core: str, *options: str) -> str:
    analyser = next((found for name in ANALYSERS if (found := shutil.which(name))), None)
    if analyser is None:
        sys.exit("llvm-mca is not installed: apt install llvm-19")
    features = "-mattr=+dotprod,+i8mm,+bf16,+fp16fml"
    command = [analyser, f"-mtriple={TRIPLE}", f"-mcpu={core}", features, f"-iterations={ITERATIONS}", *options]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout


def row(layer: str, operator: Conv2D | Dense, core: str, precision: str) -> list[str]:
    """The table's row of a layer on a core."""
    kernel = select_kernel(
        families_for_target(CORES[core], Processor(l1_sets=L1_SETS.get(core, 256))), request_for(operator, precision)
    )
    loop = innermost_loop(assembly(kernel, core))
    spent = cycles(loop.instructions, core)
    peak_instructions, peak_products = loop.peak_loop()
    useful = useful_share(operator, loop)
    rate, peak = useful * loop.products / spent, useful * peak_products / cycles(peak_instructions, core)
    numbers = [str(len(loop.instructions)), str(loop.on_the_stack), f"{spent:.1f}", f"{rate:.1f}", f"{peak:.1f}"]
    of_bound = least_cycles(loop.work, core) / spent
    return [core, layer, kernel.name.partition(".")[2], *numbers, f"{rate / peak:.0%}", f"{of_bound:.0%}"]


def useful_share(operator: Conv2D | Dense, loop: Loop) -> float:
    """The share of a loop's products that are not by zeros: depthwise kernels of words fill them up to four rows."""
    if not (isinstance(operator, Conv2D) and operator.is_depthwise and loop.form.products == _WORD_PRODUCTS):
        return 1.0
    rows = operator.window.kernel[0]
    return rows / (-(-rows // _WORD_ROWS) * _WORD_ROWS)


def main() -> None:
    """Prints one table for all cores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", default=",".join(CORES))
    parser.add_argument("--precision", default="a8w8", choices=PRECISIONS)
    arguments = parser.parse_args()
    columns = (
        "core",
        "layer",
        "kernel",
        "instructions",
        "spills",
        "cycles",
        "MACs/cycle",
        "peak",
        "of peak",
        "of bound",
    )
    rows = [
        row(layer, operator, core, arguments.precision)
        for core in arguments.cores.split(",")
        for layer, operator in LAYERS.items()
    ]
    print_table(columns, rows)


if __name__ == "__main__":
    main()
