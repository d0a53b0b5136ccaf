"""Places tensors that live at different times in shared blocks of memory.

Source: Y. Pisarchyk, J. Lee, *Efficient Memory Management for Deep Neural Net Inference*, MLSys 2020 workshop (arXiv
2001.03288), "Greedy by Size for Shared Objects": the largest tensors are placed first, each in the smallest block whose
tensors all live at other times, or in one of its own. Offsets in one block would take less still, but kernels as TVM compiles
them want tensors that begin where their block begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """A tensor: its size in bytes, and the first and the last step at which its memory is in use."""

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both live at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class MemoryPlan:
    """The block of each tensor, and the bytes of each block."""

    blocks: tuple[int, ...]
    sizes: tuple[int, ...]


def plan_blocks(lifetimes: Sequence[Lifetime]) -> MemoryPlan:
    """Blocks for tensors; those that live at one step have different ones."""
    order = sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].first))
    members: list[list[Lifetime]] = []
    blocks: dict[int, int] = {}
    for index in order:
        own = lifetimes[index]
        free = [number for number, others in enumerate(members) if not any(own.meets(other) for other in others)]
        if free:
            # Blocks were made from the largest to the smallest.
            blocks[index] = free[-1]
        else:
            blocks[index] = len(members)
            members.append([])
        members[blocks[index]].append(own)
    sizes = tuple(others[0].size for others in members)
    return MemoryPlan(tuple(blocks[i] for i in range(len(lifetimes))), sizes)


def largest_set(lifetimes: Sequence[Lifetime]) -> int:
    """Bytes of the tensors that live at one step, at the step where they are the most: no plan takes less."""
    steps = {lifetime.first for lifetime in lifetimes}
    return max((sum(t.size for t in lifetimes if t.first <= step <= t.last) for step in steps), default=0)
