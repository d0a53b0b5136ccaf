"""Checks a wheel against the working tree: every file of the package is in it, once, and nothing else is.

python .ci/check_wheel.py dist/tvm_hquant-0.1.0-py3-none-any.whl
"""

from __future__ import annotations

import sys
import zipfile
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = {"tvm_hquant": "tvm_hquant", "passes": "tvm_hquant/passes", "target_specs": "tvm_hquant/target_specs"}
IGNORED = {"__pycache__", ".mypy_cache", ".ruff_cache"}


def expected_files() -> set[str]:
    """Paths in the wheel of all files of the package's folders; the links to two of them are not followed."""
    return {
        f"{package}/{path.relative_to(REPOSITORY / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and not IGNORED & set(path.parts) and not _is_below_link(path)
    }


def _is_below_link(path: Path) -> bool:
    return any(p.is_symlink() for p in (path, *path.parents) if p.is_relative_to(REPOSITORY))


def main(wheel: str) -> int:
    with zipfile.ZipFile(wheel) as archive:
        counts = Counter(name for name in archive.namelist() if ".dist-info/" not in name)
    expected = expected_files()
    problems = {
        "missing": expected - set(counts),
        "not part of the package": set(counts) - expected,
        "twice": {name for name, count in counts.items() if count > 1},
    }
    for problem, names in problems.items():
        for name in sorted(names):
            print(f"{wheel}: {problem}: {name}", file=sys.stderr)
    if any(problems.values()):
        return 1
    print(f"{Path(wheel).name} holds all {len(expected)} files, each once")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
