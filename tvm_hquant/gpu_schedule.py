"""A rule of TVM's dlight for kernels that sum and then finish each sum: both in one launch, the sum in a register.

dlight's ``Fallback`` gives every block a launch of its own, with the sums in global memory between them. Its rules for sums
(``Reduction``, ``GeneralReduction``, ``GEMV``) share a sum out among threads, which in floats would be another order than the
arithmetic contract's. Here a thread makes one element, all of it, and neighbouring threads neighbouring channels.

Before::

    for i, j, c, ky, kx in T.grid(5, 4, 20, 3, 3):
        with T.sblock("sum"):
            ...                                    # total[i, j, c] += x[...]
    for i, j, c in T.grid(5, 4, 20):
        with T.sblock("mean"):
            ...                                    # y[i, j, c] = total[i, j, c] * ...

After::

    for block in T.thread_binding(4, thread="blockIdx.x"):
        for thread in T.thread_binding(128, thread="threadIdx.x"):
            ...                                    # total = 0, in scope "local"
            for ky, kx in T.grid(3, 3):
                ...
            ...                                    # y[...] = total * ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.gpu.base import GPUScheduleRule

_THREADS = 128
"""Threads of a block."""


class SumsInRegisters(GPUScheduleRule):  # type: ignore[misc] # TVM has no types
    """For functions of one block that sums and others behind it, of the same elements, that read their own sum."""

    def apply(self, func: Any, target: Any, _tunable: bool) -> Any:
        """A schedule, or None where the function is for another rule."""
        if not isinstance(func, tirx.PrimFunc) or not self.is_target_available(target):
            return None
        schedule = s_tir.Schedule(func)
        blocks = normalize_prim_func(schedule)
        if not blocks or not _is_served(schedule, blocks):
            return None
        first, *others = (info.block_rv for info in blocks)
        loops = [
            loop for loop, kind in zip(schedule.get_loops(first), blocks[0].dom_kind(), strict=True) if kind == "S"
        ]
        grid, thread = schedule.split(schedule.fuse(*loops), factors=[None, _THREADS])
        schedule.bind(grid, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        for other in others:
            schedule.reverse_compute_at(other, thread)
        for written in (first, *others[:-1]):
            schedule.set_scope(written, 0, "local")
        schedule.decompose_reduction(first, schedule.get_loops(first)[2])
        return schedule


def _is_served(schedule: Any, blocks: Sequence[Any]) -> bool:
    first, *others = blocks
    spatial = [[axis.dom for axis in info.iters if axis.kind == "S"] for info in blocks]
    if not others or not first.is_reduction() or not spatial[0] or any(info.is_reduction() for info in others):
        return False
    if any(kind not in "SR" for info in blocks for kind in info.dom_kind()) or any(s != spatial[0] for s in spatial):
        return False
    bodies = [schedule.get(info.block_rv) for info in blocks]
    made = [body.writes[0].source for body in bodies[:-1]]
    return all(len(body.writes) == 1 and _reads_own(body, made) for body in bodies[1:])


def _reads_own(body: Any, made: Sequence[Any]) -> bool:
    """Whether of the buffers that other blocks made a block reads only the element that it is at."""
    own = [axis.var for axis in body.iter_vars]
    for region in body.reads:
        if any(region.source.same_as(buffer) for buffer in made):
            indices = [axis.min for axis in region.region if not isinstance(axis.min, tirx.IntImm)]
            is_own = len(indices) == len(own) and all(i.same_as(v) for i, v in zip(indices, own, strict=True))
            if not is_own or any(int(axis.extent) != 1 for axis in region.region):
                return False
    return True
