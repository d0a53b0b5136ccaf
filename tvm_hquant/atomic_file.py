"""Files that are whole or not there, whenever a process is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_at_once(path: Path, content: str | bytes) -> None:
    """Writes a file in one step: readers find the old one or the new one, never a part.

    Processes may write the same file at once; the last one wins.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
