"""Progress of long steps on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


def terminal_progress(console: Console) -> Any:
    """A function for :data:`tvm_hquant.session.Progress` that draws a bar with the time left.

    Where ``console`` is no terminal it draws nothing.
    """

    def wrap(description: str, items: Iterable[Any], count: int | None) -> Iterator[Any]:
        if not console.is_terminal:
            yield from items
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(items, total=count, description=description)

    return wrap
