"""Linear algebra on one thread, so that what is computed from calibration samples does not depend on the number of cores.

BLAS divides a product among as many threads as there are cores, and each division sums in another order: the last bits of
covariances, and now and then a rounded weight, would differ from one machine to another of the same kind. The matrices of
single layers are small, and threads that wait for each other by spinning cost far more than they give where other processes
compute too, as the workers of an evaluation do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """What is computed within uses one thread of BLAS; other users of it in this process are back at theirs afterwards."""
    with threadpool_limits(limits=1, user_api="blas"):
        yield
