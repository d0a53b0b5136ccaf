"""Fixtures for tests of all folders, and what their processes share."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

import pytest

from tests.emulated_board.board import Board, BoardMissingError, find_board
from tvm_hquant.simulator.kernel_cache import VARIABLE

LONGEST = ("zoo", "light")
"""Folders of tests that take longest, each a whole network."""


def pytest_configure(config: pytest.Config) -> None:
    """Kernels of the simulator are compiled once for all processes, from nothing: what the user compiled before is not seen.

    Processes that tests start, and those of pytest-xdist, inherit the folder's name.
    """
    if VARIABLE not in os.environ:
        folder = TemporaryDirectory(prefix="hquant_kernels_")
        os.environ[VARIABLE] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end every process has short tests left to take from another."""
    items.sort(key=lambda item: item.path.parent.name not in LONGEST)


@pytest.fixture(scope="session")
def emulated_board() -> Board:
    """The emulated AArch64 board; tests that ask for it are skipped, with the reason, where it is not set up."""
    try:
        return find_board()
    except BoardMissingError as reason:
        pytest.skip(str(reason))
