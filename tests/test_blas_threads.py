"""What is computed from calibration samples must not depend on how many cores a machine has."""

from __future__ import annotations

from threadpoolctl import threadpool_info, threadpool_limits

from tvm_hquant.blas_threads import one_blas_thread


def blas_threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def test_one_thread_within_and_those_of_before_afterwards() -> None:
    """Sums are not divided among cores while calibrating and rounding, and the caller's own setting comes back."""
    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        with one_blas_thread():
            assert blas_threads() == {1}
        assert blas_threads() == before
