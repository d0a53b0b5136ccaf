"""Tells for what part of the time a core was shared with something else.

On a shared machine the other hardware thread of a core belongs to somebody else. While that is busy, code that issues as many
instructions as the core can takes up to twice as long, and code that waits for products or memory hardly longer, so that a
comparison says more about the neighbour than about the engines. A probe is a tenth of a millisecond of additions, as many at
a time as a core has adders: it takes longer while the core is shared, whatever is measured before and after it.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

SOURCE = r"""
#include <time.h>
#define ADD(x) x += 1; __asm__ volatile("" : "+r"(x));
#define ADD8 ADD(a) ADD(b) ADD(c) ADD(d) ADD(e) ADD(f) ADD(g) ADD(h)
double additions(long count) {
  unsigned long a = 0, b = 0, c = 0, d = 0, e = 0, f = 0, g = 0, h = 0;
  struct timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  for (long i = 0; i < count; i += 16) { ADD8 ADD8 }
  clock_gettime(CLOCK_MONOTONIC, &end);
  return (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
}
"""

TOLERANCE = 1.1
"""How many times the shortest probe's time one may take on a core that is not shared."""

_ADDITIONS = 1_000_000
_PROBES = 20


def core_probe(folder: Path, cores: int) -> Callable[[], list[float]]:
    """A function that returns the seconds of some probes on the last ``cores`` cores of this process, after one another.

    Raises:
        SystemExit: there is no C compiler.
    """
    if shutil.which("cc") is None:
        raise SystemExit("a C compiler named cc is needed to tell whether the core is shared")
    library = folder / "core_probe.so"
    folder.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-O2", "-std=gnu99", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=SOURCE, text=True, check=True)
    additions = ctypes.CDLL(str(library)).additions
    additions.restype, additions.argtypes = ctypes.c_double, [ctypes.c_long]

    def probe() -> list[float]:
        allowed = os.sched_getaffinity(0)
        seconds: list[float] = []
        try:
            for core in sorted(allowed)[-cores:]:
                os.sched_setaffinity(0, {core})
                seconds += [float(additions(_ADDITIONS)) for _ in range(_PROBES)]
        finally:
            os.sched_setaffinity(0, allowed)
        return seconds

    return probe


def shared_part(probes: Sequence[float]) -> float:
    """The part of the probes, 0 to 1, during which something else used the core."""
    limit = TOLERANCE * min(probes)
    return sum(seconds > limit for seconds in probes) / len(probes)
