"""The processes of this machine that compute for evaluations."""

from __future__ import annotations

import builtins
import os
import time

import numpy as np
import pytest

from tvm_hquant.simulator.runner import local_executor


def test_workers_keep_what_they_hold() -> None:
    """A worker that comes to hold the weights of a large network is not started anew without them."""
    pytest.importorskip("psutil", reason="only with it does loky watch the memory of its workers")

    def hold(megabytes: int) -> int:
        builtins.held = np.ones((megabytes, 1 << 20), "uint8")  # type: ignore[attr-defined]
        time.sleep(1.1)  # loky looks at most once a second
        return os.getpid()

    executor, _ = local_executor(1)
    with executor:
        first = executor.submit(hold, 1).result()
        assert executor.submit(hold, 400).result() == first
        assert executor.submit(os.getpid).result() == first
