"""How long loops show where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Progress = Callable[[str, Iterable[Any], int | None], Iterator[Any]]
"""Wraps an iterable: (description, items, how many or None) → the items. A caller may show progress."""


def silent_progress(_description: str, items: Iterable[Any], _count: int | None) -> Iterator[Any]:
    """Shows nothing."""
    return iter(items)
