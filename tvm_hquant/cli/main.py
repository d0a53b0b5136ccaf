"""``hquant``: the command line. Errors that a user can mend print one message and exit with code 2."""

from __future__ import annotations

import os
import sys

from tvm_hquant.errors import HQuantError

BUDGET_MISSED = 3
"""Exit code when an artifact was written, but no plan kept the loss budget."""


def main() -> None:
    """Entry point of the ``hquant`` script."""
    debug = "--debug" in sys.argv[1:] or bool(os.environ.get("HQUANT_DEBUG"))
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        from tvm_hquant.cli.application import application

        application(args=arguments, prog_name="hquant")
    except HQuantError as error:
        if debug:
            raise
        _fail(str(error))
    except MemoryError:
        if debug:
            raise
        _fail("this machine has too little memory for that: use fewer samples or a smaller --input-shapes")
    except KeyboardInterrupt:
        _fail("interrupted; no artifact was written", code=130)
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")


def _fail(message: str, code: int = 2) -> None:
    print(f"hquant: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
