"""What the CPU of this machine can do: the one place that reads its flags.

Linux lists them in ``/proc/cpuinfo``: ``flags`` on x86 (arch/x86/include/asm/cpufeatures.h), ``Features`` on ARM
(arch/arm64/kernel/cpuinfo.c). LLVM and the vendors' manuals spell some of them in another way;
:func:`normalize_feature` maps all spellings to Linux's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from pathlib import Path

from tvm_hquant.errors import TargetSpecError

CPUINFO = Path("/proc/cpuinfo")

_LINUX_SPELLING = {
    "avx512vnni": "avx512_vnni",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512_vbmi": "avx512vbmi",
    "avxvnni": "avx_vnni",
    "avxvnniint8": "avx_vnni_int8",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "sse3": "pni",
    "neon": "asimd",
    "dotprod": "asimddp",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "fp_armv8": "fp",
}
"""Other spellings of a feature, in lower case with underscores, and Linux's."""


def normalize_feature(feature: str) -> str:
    """Linux's spelling of a CPU feature: ``AVX512-VNNI`` → ``avx512_vnni``, ``dotprod`` → ``asimddp``."""
    plain = feature.strip().lower().lstrip("+").replace("-", "_").replace(".", "_")
    return _LINUX_SPELLING.get(plain, plain)


def normalize_features(features: Iterable[str]) -> frozenset[str]:
    """The set of :func:`normalize_feature` of each."""
    return frozenset(normalize_feature(feature) for feature in features)


def cpu_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Features that all processors of this machine have, in Linux's spelling; empty where Linux lists none.

    Cores of unlike kinds (big.LITTLE) may differ, and a thread may run on any of them: only common features count.

    Raises:
        TargetSpecError: ``cpuinfo`` cannot be read.
    """
    lists = [value.split() for key, value in cpuinfo_entries(cpuinfo) if key in ("flags", "Features")]
    return reduce(frozenset.__and__, map(normalize_features, lists)) if lists else frozenset()


def cpuinfo_entries(cpuinfo: Path = CPUINFO) -> tuple[tuple[str, str], ...]:
    """The ``key : value`` lines of ``/proc/cpuinfo`` in order, all processors one after the other.

    Raises:
        TargetSpecError: the file cannot be read.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise TargetSpecError(
            f"cannot read the CPU's features from {cpuinfo} ({error.strerror}): they are read on Linux only; "
            "name a shipped target spec or write one (docs/target-spec.md)"
        ) from error
    pairs = (line.partition(":") for line in lines if ":" in line)
    return tuple((key.strip(), value.strip()) for key, _, value in pairs)


def cpu_identity(cpuinfo: Path = CPUINFO) -> str:
    """A name for this machine's processor model, for measurements that hold on it alone; no feature follows from it.

    Vendor, family and model on x86, implementer and part of every kind of core on ARM.

    Raises:
        TargetSpecError: ``cpuinfo`` cannot be read.
    """
    entries = cpuinfo_entries(cpuinfo)
    fields = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
    found = dict.fromkeys(f"{key} {value}" for key, value in entries if key in fields)
    return ", ".join(found) or "unknown"
