"""Runs on the board: serves TVM's RPC until standard input ends.

    serve_rpc.py PYTHON READY

PYTHON: a program that runs the board's Python from outside of the emulator. READY: the file that gets the port.
"""

from __future__ import annotations

import sys
from pathlib import Path

python, ready = sys.argv[1], Path(sys.argv[2])
sys.executable = python

from tvm import rpc  # noqa: E402 - reads sys.executable

server = rpc.Server("127.0.0.1", port=19090, port_end=19290, no_fork=False)
aside = ready.with_suffix(".new")
aside.write_text(str(server.port), encoding="utf-8")
aside.rename(ready)  # whoever sees the file can read it
sys.stdin.read()
server.terminate()
