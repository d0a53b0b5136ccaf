"""What kernels know of a processor besides its instructions: its caches, and the cores that share work.

Registers, lanes and latencies are those of the instruction set (:class:`tvm_hquant.kernels.dot_product.DotProduct`).
"""

from __future__ import annotations

from dataclasses import dataclass

CACHE_LINE = 64
"""Bytes of a line of a cache."""
_ITEMS_OF_A_CORE = 4
"""Where a core takes so many items of equal work, or one fewer, cores wait for each other for a quarter of the time at most.
Twice as many make 3×3 layers of 64 channels take 2 to 3 % longer on one core."""
_FEWEST_ITEMS = 32
"""So many there are in any case: few cores finish at about the same time, and items of most layers are still many tiles."""


@dataclass(frozen=True)
class Work:
    """What a kernel does, as far as it decides whether threads share it: instructions on vectors, and bytes that are read or
    written."""

    instructions: float
    moved_bytes: int


@dataclass(frozen=True)
class Processor:
    """Caches as one core sees them, how many cores there are, and what it takes to fetch from afar and to share work.

    The defaults stand for what a target spec leaves out; times that they state were measured on a Zen 4, of about two
    instructions a cycle.

    Attributes:
        l1_bytes: of the first-level data cache.
        l1_sets: its sets: lines that lie ``CACHE_LINE * l1_sets`` bytes apart share one.
        l2_bytes: of the second-level cache; where there is none, of the first.
        last_bytes: of the last-level cache, which the cores share.
        cores: that share the work of a kernel.
        l2_vector_instructions: in the time in which the second-level cache passes a vector on (32 bytes a cycle).
        line_instructions: in the time of a cache line from another core or a farther cache. A core that works alone takes
            over what others wrote, and they what it writes: 33 ns a line between two cores. Weights from the last cache
            take 1 ns.
        other_core_line: a line that another core wrote takes so many times as long as one from the last cache (3 ns; it
            takes 28 ns to write one that another core has read).
        shared_instructions: of less work no thread gets a part. On two threads of TVM's pool a loop takes 0.8 µs more, for
            half of its own time, so it has to take 1.6 µs: 6000 cycles.
    """

    l1_bytes: int = 32 * 2**10
    l1_sets: int = 64
    l2_bytes: int = 512 * 2**10
    last_bytes: int = 16 * 2**20
    cores: int = 4
    l2_vector_instructions: float = 2.25
    line_instructions: float = 32
    other_core_line: float = 3
    shared_instructions: float = 12_000

    @property
    def l1_ways(self) -> int:
        """Lines that a set of the first-level cache holds."""
        return self.l1_bytes // (CACHE_LINE * self.l1_sets)

    @property
    def last_share(self) -> int:
        """Bytes of the last cache for each core, while all of them work."""
        return max(self.l2_bytes, self.last_bytes // self.cores)

    @property
    def fewest_items(self) -> int:
        """Items that work is cut into, where it has so many parts: threads that take whole items then finish at about the
        same time."""
        return max(_FEWEST_ITEMS, _ITEMS_OF_A_CORE * self.cores)

    def shares(self, work: Work) -> bool:
        """Whether threads share a kernel that does so much (:func:`tvm_hquant.kernels.work.work`)."""
        instructions = work.instructions + self.line_instructions * work.moved_bytes / CACHE_LINE
        return self.cores > 1 and instructions > self.shared_instructions


ASSUMED_PROCESSOR = Processor()
"""What nothing is said about."""
