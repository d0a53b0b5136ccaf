"""An AArch64 board without hardware: Debian's arm64 Python and TVM's aarch64 wheels under ``qemu-aarch64``.

``build_board.py`` sets it up once; the fixture ``emulated_board`` (``tests/conftest.py``) hands it to tests. Times
measured under emulation mean nothing, results do: the emulator computes every instruction as the processor does.
"""
