"""``hquant``: the command line. Errors that a user can mend print one message and exit with code 2."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from tvm_hquant.errors import HQuantError

BUDGET_MISSED = 3
"""Exit code when an artifact was written, but no plan kept the loss budget."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class _Interruption:
    """Ctrl-C, and that it was pressed: inside a call of TVM it comes back as some other error."""

    def __init__(self) -> None:
        self.happened = False

    def __call__(self, _signal: int, _frame: FrameType | None) -> NoReturn:
        self.happened = True
        raise KeyboardInterrupt


def main() -> None:
    """Entry point of the ``hquant`` script."""
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("HQUANT_DEBUG"))
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    interruption = _Interruption()
    before = signal.signal(signal.SIGINT, interruption)
    try:
        from tvm_hquant.cli.application import application

        application(args=arguments, prog_name="hquant")
    except BaseException as error:
        if interruption.happened:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            _fail("interrupted; no artifact was written", INTERRUPTED)
        message = _message(error)
        if message is None or debug:
            raise
        _fail(message)
    finally:
        signal.signal(signal.SIGINT, before)


def _message(error: BaseException) -> str | None:
    """What a user is told; None for an error that is none of the user's."""
    if isinstance(error, HQuantError):
        return str(error)
    if isinstance(error, MemoryError):
        return "this machine has too little memory for that: use fewer samples or a smaller --input-shapes"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    return None


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"hquant: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
