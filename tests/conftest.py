"""Fixtures for tests of all folders."""

from __future__ import annotations

import os

import pytest

from tests.emulated_board.board import Board, BoardMissingError, find_board
from tvm_hquant.simulator.kernel_cache import OFF, VARIABLE

# Tests compile what they run, whatever the user has compiled before. Processes that they start inherit this.
os.environ.setdefault(VARIABLE, OFF)


@pytest.fixture(scope="session")
def emulated_board() -> Board:
    """The emulated AArch64 board; tests that ask for it are skipped, with the reason, where it is not set up."""
    try:
        return find_board()
    except BoardMissingError as reason:
        pytest.skip(str(reason))
