"""Progress of long steps on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any


def terminal_progress() -> Any:
    """A function for :data:`tvm_hquant.session.Progress` that draws a bar with the time left on standard error.

    Where standard error is no terminal it draws nothing.
    """

    def wrap(description: str, items: Iterable[Any], count: int | None) -> Iterator[Any]:
        if not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            yield from progress.track(items, total=count, description=description)

    return wrap
