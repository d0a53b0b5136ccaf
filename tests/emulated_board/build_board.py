"""Sets the emulated board up, once: downloads about 130 MB, takes about a minute and 500 MB of disk.

    python tests/emulated_board/build_board.py

Needs the Debian packages ``qemu-user`` and ``gcc-aarch64-linux-gnu`` (and ``apt-get``, ``dpkg-deb`` and Debian's archive
keys), but no root: Debian's arm64 packages come through an apt of its own in the board's folder, TVM's aarch64 wheels
through pip. A board that is there already and fits is left as it is. Exit code 0: the board is there; 1: it is not, and
the message says why.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.emulated_board.board import (
    EMULATOR,
    TARGET_FEATURES,
    Board,
    BoardMissingError,
    Marker,
    board_folder,
    find_board,
)

SUITE = "bookworm"
KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SOURCES = f"""\
deb [arch=arm64 signed-by={KEYS}] http://deb.debian.org/debian {SUITE} main
deb [arch=arm64 signed-by={KEYS}] http://deb.debian.org/debian-security {SUITE}-security main
"""
SYSTEM_PACKAGES = ("python3.11", "libstdc++6")
PYTHON_VERSION = "3.11"
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64", "manylinux_2_17_aarch64")
MODULES = ("packages", f"root/usr/lib/python{PYTHON_VERSION}")
"""Folders of Python modules on the board."""
SAME_VERSION_AS_HERE = ("apache-tvm", "apache-tvm-ffi")
PYTHON_PACKAGES = ("numpy>=2,<3", "ml_dtypes", "typing_extensions", "psutil", "tornado", "cloudpickle")

READ_CAPABILITIES = "import ctypes; print(*map(ctypes.CDLL(None).getauxval, (16, 26)))"
"""AT_HWCAP and AT_HWCAP2 (linux/auxvec.h): which optional instructions the CPU has."""

# Bit numbers and names: arch/arm64/include/uapi/asm/hwcap.h and arch/arm64/kernel/cpuinfo.c of Linux.
CAPABILITIES = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 "
    "sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg"
)
CAPABILITIES_2 = (
    "dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 "
    "dgh rng bti mte"
)


def build_board(folder: Path) -> None:
    """Builds a board aside and renames it, so that ``folder`` never holds half of one.

    Raises:
        BoardMissingError: something that it needs is missing, or a download failed.
    """
    for program, package in ((EMULATOR, "qemu-user"), ("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(program) is None:
            raise BoardMissingError(f"{program} is not installed (Debian package {package})")
    if not KEYS.exists():
        raise BoardMissingError(f"{KEYS} is missing (Debian package debian-archive-keyring)")
    if folder.exists() and Marker.read(folder) is None and any(folder.iterdir()):
        raise BoardMissingError(f"{folder} holds something else: choose another folder in HQUANT_BOARD")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = Path(temporary) / "board"
        for name in ("root", "packages", "cpus"):
            (new / name).mkdir(parents=True)
        print("downloading Debian's arm64 packages", flush=True)
        for archive in download_system(Path(temporary) / "apt"):
            run(["dpkg-deb", "-x", str(archive), str(new / "root")])
        print("downloading aarch64 wheels", flush=True)
        for wheel in download_wheels(Path(temporary) / "wheels"):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(new / "packages")
        for cpu in TARGET_FEATURES:
            make_cpu_root(new, cpu)
        compile_modules(new)
        Marker.wanted().write(new)
        if folder.exists():
            shutil.rmtree(folder)
        new.rename(folder)


def download_system(folder: Path) -> list[Path]:
    """The board's Debian packages with what they depend on, through an apt that knows only this folder."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "sources.list").write_text(SOURCES, encoding="utf-8")
    (folder / "status").touch()
    options = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State": folder,
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    run([*apt, "update"])
    run([*apt, "--no-install-recommends", "--download-only", "--yes", "install", *SYSTEM_PACKAGES])
    return sorted((folder / "cache" / "archives").glob("*.deb"))


def download_wheels(folder: Path) -> list[Path]:
    """TVM's wheels in the versions of this machine, and those of the packages that it needs."""
    exact = [f"{name}=={version(name)}" for name in SAME_VERSION_AS_HERE]
    target = ["--only-binary=:all:", "--no-deps", f"--python-version={PYTHON_VERSION}", "--implementation=cp"]
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", f"--dest={folder}"]
    run([*pip, *target, *platforms, *exact, *PYTHON_PACKAGES])
    return sorted(folder.glob("*.whl"))


def make_cpu_root(board: Path, cpu: str) -> None:
    """A root of links to the board's, with the ``/proc/cpuinfo`` of one CPU: the emulator shows this machine's."""
    root = board / "cpus" / cpu
    (root / "proc").mkdir(parents=True)
    for entry in (board / "root").iterdir():
        (root / entry.name).symlink_to(Path("..", "..", "root", entry.name))
    bits = run(Board(board).command("-c", READ_CAPABILITIES, cpu=cpu)).split()
    tables = zip((CAPABILITIES, CAPABILITIES_2), map(int, bits), strict=True)
    features = [name for names, word in tables for bit, name in enumerate(names.split()) if word >> bit & 1]
    (root / "proc" / "cpuinfo").write_text(f"processor\t: 0\nFeatures\t: {' '.join(features)}\n\n", encoding="utf-8")


def compile_modules(board: Path) -> None:
    """Writes the bytecode of the board's Python modules, unless it is there.

    Without it, every process on the board compiles all that it imports: most of the time that ``import tvm`` takes. This
    machine's Python does it where it has the board's version.
    """
    is_same = sys.version_info[:2] == tuple(map(int, PYTHON_VERSION.split(".")))
    python = [sys.executable] if is_same else Board(board).command()
    run([*python, "-m", "compileall", "-qq", *(str(board / folder) for folder in MODULES)])


def run(command: Sequence[str]) -> str:
    """What a command wrote to standard output.

    Raises:
        BoardMissingError: it failed; the message holds what it wrote to standard error.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BoardMissingError(f"'{' '.join(command[:3])} …' failed: {result.stderr.strip() or result.stdout.strip()}")
    return result.stdout


def main() -> int:
    folder = board_folder()
    if Marker.read(folder) == Marker.wanted():
        for cpu in TARGET_FEATURES:
            if not (folder / "cpus" / cpu).is_dir():
                make_cpu_root(folder, cpu)
                print(f"added a {cpu}")
        compile_modules(folder)
        print(f"the emulated board in {folder} is up to date")
        return 0
    try:
        build_board(folder)
        find_board()
    except BoardMissingError as reason:
        print(f"no emulated board: {reason}", file=sys.stderr)
        return 1
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    print(f"the emulated board is in {folder} ({size / 1e6:.0f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
