"""The emulated board does what other tests rely on: it is the CPU it claims to be, and runs TVM modules bit for bit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tests.emulated_board.board import Board, BoardMissingError, Marker, export_for_board, find_board, tvm_target

HEIGHT, INPUTS, OUTPUTS = 6, 4, 8
RUN_MODULE = Path(__file__).with_name("run_module.py")


@I.ir_module
class Convolution:
    """A 3×3 convolution of int8 codes into int32, channels last, no padding."""

    @T.prim_func(private=True)
    def conv(
        x: T.Buffer((HEIGHT, HEIGHT, INPUTS), "int8"),
        w: T.Buffer((3, 3, INPUTS, OUTPUTS), "int8"),
        y: T.Buffer((HEIGHT - 2, HEIGHT - 2, OUTPUTS), "int32"),
    ):
        for i, j, o in T.grid(HEIGHT - 2, HEIGHT - 2, OUTPUTS):
            y[i, j, o] = 0
            for kh, kw, c in T.grid(3, 3, INPUTS):
                y[i, j, o] = y[i, j, o] + T.Cast("int32", x[i + kh, j + kw, c]) * T.Cast("int32", w[kh, kw, c, o])

    @R.function
    def main(x: R.Tensor((HEIGHT, HEIGHT, INPUTS), "int8"), w: R.Tensor((3, 3, INPUTS, OUTPUTS), "int8")):
        cls = Convolution
        return R.call_tir(cls.conv, (x, w), out_ty=R.Tensor((HEIGHT - 2, HEIGHT - 2, OUTPUTS), "int32"))


@pytest.fixture(scope="module")
def arrays():
    random = np.random.default_rng(0)
    shapes = {"x": (HEIGHT, HEIGHT, INPUTS), "w": (3, 3, INPUTS, OUTPUTS)}
    return {name: random.integers(-128, 128, shape, dtype=np.int8) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def expected(arrays):
    windows = np.lib.stride_tricks.sliding_window_view(arrays["x"].astype(np.int32), (3, 3), axis=(0, 1))
    return np.einsum("ijckl,klco->ijo", windows, arrays["w"].astype(np.int32))


@pytest.fixture(scope="module")
def library(emulated_board, tmp_path_factory):
    executable = tvm.compile(Convolution, tvm_target("cortex-a72"))
    return export_for_board(executable, tmp_path_factory.mktemp("board") / "convolution.so")


def assert_succeeded(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr


def test_module_gives_the_same_bits_as_numpy(emulated_board, library, arrays, expected, tmp_path):
    """The whole chain: cross compiler, loader, TVM's runtime without the compiler, results back."""
    np.savez(tmp_path / "inputs.npz", **arrays)
    output = tmp_path / "output.npy"
    result = emulated_board.run_python(
        RUN_MODULE, library, tmp_path / "inputs.npz", output, cpu="cortex-a72", runtime_only=True
    )
    assert_succeeded(result)
    np.testing.assert_array_equal(np.load(output), expected)


@pytest.mark.parametrize(("cpu", "has_dot_product"), [("cortex-a72", False), ("cortex-a76", True)])
def test_project_runtime_sees_the_emulated_cpu(emulated_board, tmp_path, cpu, has_dot_product):
    """The runtime's check of required instructions sees the board's CPU, not this machine's."""
    script = tmp_path / "features.py"
    script.write_text(
        "import os\n"
        "from tvm_hquant.cpu_features import cpu_features\n"
        "print(os.uname().machine, 'asimd' in cpu_features(), 'asimddp' in cpu_features())\n",
        encoding="utf-8",
    )
    result = emulated_board.run_python(script, cpu=cpu)
    assert_succeeded(result)
    assert result.stdout.split() == ["aarch64", "True", str(has_dot_product)]


def test_missing_instruction_is_not_emulated_silently(emulated_board, tmp_path):
    """A kernel that uses the dot product on a CPU without one has to fail, or tests of such kernels would mean nothing."""
    source, library = tmp_path / "dot.c", tmp_path / "dot.so"
    source.write_text('int dot(void) { __asm__("sdot v0.4s, v1.16b, v2.16b"); return 7; }\n', encoding="utf-8")
    compiler = ["aarch64-linux-gnu-gcc", "-march=armv8.2-a+dotprod", "-shared", "-fPIC", source, "-o", library]
    subprocess.run(compiler, check=True)
    script = tmp_path / "dot.py"
    script.write_text("import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).dot())\n", encoding="utf-8")
    results = {cpu: emulated_board.run_python(script, library, cpu=cpu) for cpu in ("cortex-a72", "cortex-a76")}
    assert results["cortex-a76"].stdout == "7\n"
    assert results["cortex-a72"].returncode != 0


def test_environment_of_this_process_stays_outside(emulated_board, tmp_path, monkeypatch):
    """A PYTHONPATH of this machine would give the board x86 libraries; variables that are asked for arrive."""
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("TVM_LIBRARY_PATH", "/nowhere")
    script = tmp_path / "environment.py"
    script.write_text("import os; print(os.environ.get('TVM_LIBRARY_PATH'), os.environ['ASKED'])\n", encoding="utf-8")
    result = emulated_board.run_python(script, environment={"ASKED": "for"})
    assert_succeeded(result)
    assert result.stdout.split() == ["None", "for"]


def test_rpc_server_runs_a_module_from_here(emulated_board, library, arrays, expected):
    """``tvm.rpc.connect``, upload, call and time evaluator, as with a board on the network."""
    with emulated_board.start_rpc_server(cpu="cortex-a72") as server:
        session = tvm.rpc.connect(server.host, server.port, session_timeout=120)
        session.upload(str(library))
        device = session.cpu()
        machine = relax.VirtualMachine(session.load_module(library.name), device)
        machine.set_input("main", *(tvm.runtime.tensor(a, device) for a in arrays.values()))
        machine.invoke_stateful("main")
        np.testing.assert_array_equal(machine.get_outputs("main").numpy(), expected)
        seconds = machine.time_evaluator("invoke_stateful", device, number=1, repeat=2)("main").results
        assert len(seconds) == 2
        assert min(seconds) > 0


def test_unknown_cpu_is_refused(emulated_board):
    """A typing error must not end in the emulator's own message."""
    with pytest.raises(BoardMissingError, match=r"no CPU 'cortex-a7'.*cortex-a72"):
        emulated_board.command(cpu="cortex-a7")


@pytest.mark.parametrize(
    ("marker", "reason"), [(None, "no emulated board in"), (Marker(0, "0.1"), "outdated.*build_board.py")]
)
def test_unfinished_and_outdated_boards_are_not_used(monkeypatch, tmp_path, marker, reason):
    """A set-up that was interrupted, or made for another TVM, would fail in ways hard to understand."""
    monkeypatch.setenv("HQUANT_BOARD", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    if marker is not None:
        marker.write(tmp_path)
    with pytest.raises(BoardMissingError, match=reason):
        find_board()
    Marker.wanted().write(tmp_path)
    assert find_board() == Board(tmp_path)
