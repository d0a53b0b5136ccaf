"""Tables for people: drawn on a terminal, plain aligned columns in a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """Prints rows under column headings to standard output; without a terminal nothing is cut, wrapped or coloured."""
    used = [i for i, column in enumerate(columns) if column or any(row[i] for row in rows)]
    columns, rows = [columns[i] for i in used], [[row[i] for i in used] for row in rows]
    if sys.stdout.isatty():
        _draw_table(columns, rows, title)
        return
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    if title:
        print(title)
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")  # names are wrapped, never cut: they can be copied
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


class Footnotes:
    """Long texts that many cells of a table share: a cell holds a number, the text stands once below the table."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, text: str) -> str:
        """The mark that stands for a text."""
        return f"[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def print(self) -> None:
        """Prints the texts with their numbers."""
        for text, number in self._numbers.items():
            print(f"[{number}] {text}")


def shortened_names(names: Sequence[str]) -> str:
    """Names of precisions in a row of text, runs such as ``a8w7 a8w6 a8w5`` by their ends: ``a8w7…a8w5``."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _is_next(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return " ".join(f"{run[0]}…{run[-1]}" if len(run) > 2 else " ".join(run) for run in runs)


def _is_next(name: str, following: str) -> bool:
    """Whether two names differ in the bits of their weights alone, by one."""
    head, _, bits = name.rpartition("w")
    next_head, _, next_bits = following.rpartition("w")
    return head == next_head and bits.isdigit() and next_bits.isdigit() and int(bits) - 1 == int(next_bits)
