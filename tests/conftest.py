"""Fixtures for tests of all folders."""

from __future__ import annotations

import pytest

from tests.emulated_board.board import Board, BoardMissingError, find_board


@pytest.fixture(scope="session")
def emulated_board() -> Board:
    """The emulated AArch64 board; tests that ask for it are skipped, with the reason, where it is not set up."""
    try:
        return find_board()
    except BoardMissingError as reason:
        pytest.skip(str(reason))
