"""``hquant`` as a person meets it: protects every command's way through, and one line instead of a traceback for mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import typer

from tests.onnx_models import node, onnx_model, random_weights
from tvm_hquant.cli.application import application
from tvm_hquant.cli.arguments import parse_input_shapes, read_inputs
from tvm_hquant.cli.main import BUDGET_MISSED, main
from tvm_hquant.errors import DataError, HQuantError, ModelError

Array = npt.NDArray[Any]
COMMANDS = ("quickstart", "compile", "search", "run", "profile", "inspect", "verify", "tune", "targets", "version")
TARGET_COMMANDS = ("list", "instruction-sets", "show", "detect", "check")


class Result:
    """What a command printed and its exit code."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Hquant = Callable[..., Result]


@pytest.fixture
def hquant(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hquant:
    """Runs the entry point of the script in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["hquant", *map(str, arguments)])
        monkeypatch.delenv("HQUANT_DEBUG", raising=False)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Result(code if isinstance(code, int) else 0 if code is None else 1, out, err)

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, its data, and an artifact that was compiled from them."""
    folder = tmp_path_factory.mktemp("cli")
    weights = random_weights(conv=(4, 2, 3, 3), head=(3, 4))
    model = onnx_model(
        [
            node("Conv", "x conv.weight", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
            node("Relu", "a", "b"),
            node("GlobalAveragePool", "b", "c"),
            node("Flatten", "c", "d"),
            node("Gemm", "d head.weight", "y", transB=1),
        ],
        {"conv.weight": weights["conv"], "head.weight": weights["head"]},
        {"x": ("batch", 2, 6, 6)},
    )
    onnx.save(model, folder / "model.onnx")
    images = np.random.default_rng(0).normal(size=(24, 2, 6, 6)).astype("float32")
    np.savez(folder / "data.npz", x=images)
    np.save(folder / "images.npy", images)
    np.savez(folder / "labelled.npz", x=images, labels=np.arange(24) % 3)
    np.savez(folder / "wrong.npz", x=images[:, :1])
    np.savez(folder / "empty.npz", x=images[:0])
    broken = images.copy()
    broken[3, 0, 0, 0] = np.nan
    np.savez(folder / "nan.npz", x=broken)
    (folder / "garbage.onnx").write_bytes(b"no model at all")
    (folder / "garbage.npz").write_bytes(b"no data at all")
    (folder / "garbage.toml").write_text("name = ", encoding="utf-8")
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").touch()
    return folder


@pytest.fixture
def artifact(files: Path, hquant: Hquant) -> Path:
    """An int8 artifact, compiled once."""
    folder = files / "artifact"
    if not folder.exists():
        data = ("--calibration", files / "data.npz")
        done = hquant("compile", files / "model.onnx", "-o", folder, *data, "--precision", "a8w8")
        assert done.code == 0, done.err
    return folder


# Help.


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS), *(("targets", c) for c in TARGET_COMMANDS)])
def test_every_command_has_help(hquant: Hquant, command: tuple[str, ...]) -> None:
    """The usage and what the command is for."""
    done = hquant(*command, "--help")
    assert done.code == 0
    assert f"hquant {' '.join(command)}".strip() in done.out
    assert "Traceback" not in done.err


def test_every_option_is_explained() -> None:
    """No option without a sentence, no command without one."""
    group: Any = typer.main.get_command(application)
    commands = {**group.commands, **group.commands["targets"].commands}
    assert set(commands) == {*COMMANDS, *TARGET_COMMANDS}
    for name, command in commands.items():
        assert command.help.strip().endswith("."), name
        assert all(parameter.help for parameter in command.params), name


def test_help_lists_all_commands(hquant: Hquant) -> None:
    """Nothing is hidden, nothing is listed that does not exist."""
    listed = re.findall(r"^  ([a-z]+) ", hquant("--help").out.split("Commands:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)


def test_version(hquant: Hquant) -> None:
    """Both versions that a bug report needs."""
    assert re.fullmatch(r"hquant \d\S*, apache-tvm 0\.27\S*\n", hquant("version").out)


# The way through.


def test_compile_run_verify(files: Path, artifact: Path, hquant: Hquant, tmp_path: Path) -> None:
    """The three commands of the first page, with the numbers that come out of them."""
    done = hquant("run", artifact, "-i", files / "data.npz", "-o", tmp_path / "out.npz", "--print-time", "--repeat", 2)
    assert done.code == 0, done.err
    assert "y: float32 24×3" in done.out
    assert re.search(r"[\d.]+ ms a call \(median of 2", done.out)
    with np.load(tmp_path / "out.npz") as outputs:
        assert outputs["y"].shape == (24, 3)
        assert np.isfinite(outputs["y"]).all()
    done = hquant("verify", artifact)
    assert done.code == 0, done.err
    assert re.search(
        r"(\d+) of \1 tensors equal bit for bit on this machine \(2 samples\); whole module equal", done.out
    )
    done = hquant("verify", artifact, "-i", files / "images.npy", "-v")
    assert done.code == 0, done.err
    assert "(24 samples)" in done.out
    assert "head" in done.out


def test_verify_names_what_it_cannot_compare(hquant: Hquant, tmp_path: Path) -> None:
    """The contract does not cover what TVM computes: that nothing was compared there is said without being asked."""
    weights = random_weights(w=(4, 4, 1, 1))
    onnx.save(onnx_model([node("Conv", "x w", "c"), node("Sin", "c", "y")], weights), tmp_path / "model.onnx")
    assert hquant("compile", tmp_path / "model.onnx", "--precision", "float32", "-o", tmp_path / "out").code == 0
    done = hquant("verify", tmp_path / "out")
    assert done.code == 0, done.err
    found = re.search(r"not compared: 1 of (\d) tensors, .*: sin_0$", done.out, re.MULTILINE)
    assert found is not None
    assert f"{int(found[1]) - 1} of {int(found[1]) - 1} tensors equal bit for bit" in done.out


def test_npy_serves_a_model_with_one_input(files: Path, artifact: Path, hquant: Hquant) -> None:
    """No need to pack one array into an archive."""
    assert hquant("run", artifact, "-i", files / "images.npy").code == 0


def test_search_prints_the_whole_report(files: Path, hquant: Hquant, tmp_path: Path) -> None:
    """The table has the float model, the uniform ones and the plan; verbose has a row with a reason for each layer."""
    done = hquant(
        "compile", files / "model.onnx", "-o", tmp_path / "artifact", "--calibration", files / "labelled.npz",
        "--metric", "agreement", "--max-drop", 0.9, "-v", "--dump-ir", tmp_path / "ir",
    )  # fmt: skip
    assert done.code == 0, done.err
    for words in ("float32", "uniform a8w8", "plan", "within budget", "conv", "head", "held-out samples"):
        assert words in done.out
    stages = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert [name[:3] for name in stages] == [f"{i:02}_" for i in range(len(stages))]
    assert {name[3:-3] for name in stages} >= {"partition_layers", "annotate_precision", "insert_casts", "lower_layers"}
    assert "hquant.precision" in next((tmp_path / "ir").glob("*_annotate_precision.py")).read_text(encoding="utf-8")


def test_missed_budget_has_its_own_exit_code(files: Path, hquant: Hquant, tmp_path: Path) -> None:
    """The artifact is written, but a script can tell that the loss is larger than it asked for."""
    done = hquant(
        "compile", files / "model.onnx", "-o", tmp_path / "artifact", "--calibration", files / "data.npz",
        "--metric", "sqnr", "--max-drop", -1,
    )  # fmt: skip
    assert done.code == BUDGET_MISSED
    assert done.err.strip().splitlines()[-1].startswith("hquant: no plan kept the loss budget")
    assert (tmp_path / "artifact" / "manifest.json").exists()


def test_an_edited_plan_is_compiled(files: Path, artifact: Path, hquant: Hquant, tmp_path: Path) -> None:
    """The loop for people: read plan.json, change a precision, compile exactly that, without any data."""
    document = json.loads((artifact / "plan.json").read_text(encoding="utf-8"))
    document["layers"]["conv"]["precision"] = "float32"
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    done = hquant("compile", files / "model.onnx", "-o", tmp_path / "edited", "--plan", tmp_path / "plan.json")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "edited" / "manifest.json").read_text(encoding="utf-8"))
    precisions = {entry["name"]: entry["precision"] for entry in manifest["layers"]}
    assert (precisions["conv"], precisions["head"]) == ("float32", "a8w8")
    assert hquant("verify", tmp_path / "edited").code == 0


def test_weight_only_needs_no_data(files: Path, hquant: Hquant, tmp_path: Path) -> None:
    """And no report, since there is nothing to measure with."""
    done = hquant("compile", files / "model.onnx", "-o", tmp_path / "w4", "--precision", "w4")
    assert done.code == 0, done.err
    assert "wrote" in done.out


def test_inspect_says_why_not(files: Path, hquant: Hquant) -> None:
    """Every layer with what it may have on a target, and the target's reason against the rest."""
    done = hquant("inspect", files / "model.onnx", "--target", "generic-int8-npu")
    assert done.code == 0, done.err
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert "a8w8" in rows["conv"]
    assert "float32 [1]" in rows["conv"]
    assert "integers only" in rows["[1]"]
    assert "global_average_pool" in done.out


def test_profile_measures_each_layer(files: Path, hquant: Hquant) -> None:
    """Loss, size and time of each layer alone in each precision."""
    done = hquant(
        "profile",
        files / "model.onnx",
        "--calibration",
        files / "data.npz",
        "--precisions",
        "a8w8,a8w2",
        "--samples",
        4,
    )
    assert done.code == 0, done.err
    for layer in ("conv", "head"):
        for precision in ("float32", "a8w8", "a8w2"):
            assert re.search(rf"^{layer} +\S+ +{precision} +\S+ +[\d.]+ +[\d.]+", done.out, re.MULTILINE)


def test_profile_of_an_artifact_shows_every_kernel(artifact: Path, hquant: Hquant, tmp_path: Path) -> None:
    """Time, work and the share of the roofline of what was compiled, conversions included; the file says the same."""
    done = hquant("profile", artifact, "--repeat", 2, "--json", tmp_path / "profile.json")
    assert done.code == 0, done.err
    profile = json.loads((tmp_path / "profile.json").read_text())
    kernels = {k["layer"]: k for k in profile["kernels"]}
    assert list(kernels) == [row.split("  ")[0] for row in done.out.splitlines()[2 : 2 + len(kernels)]]
    assert kernels["conv"]["operations"] == 2 * 4 * 2 * 9 * 36  # channels out and in, window, pixels
    assert kernels["conv"]["precision"] == "a8w8"
    assert 0 < kernels["conv"]["fraction"] == kernels["conv"]["possible_microseconds"] / kernels["conv"]["microseconds"]
    assert kernels["convert x"]["precision"] == "float32 → uint8"
    assert kernels["convert x"]["operations"] == 2 * 36
    assert profile["whole_microseconds"] > 0


def test_profile_of_a_model_as_it_would_be_compiled(files: Path, hquant: Hquant) -> None:
    """With --precision the model is compiled first; nothing is searched."""
    done = hquant(
        "profile", files / "model.onnx", "--precision", "a8w4", "--calibration", files / "data.npz", "--repeat", 2
    )
    assert done.code == 0, done.err
    assert re.search(r"^conv +conv2d +a8w4 +\S+conv2d", done.out, re.MULTILINE)


def test_tune_and_compile_with_its_records(artifact: Path, files: Path, hquant: Hquant, tmp_path: Path) -> None:
    """The whole way: measure tiles, compile with them, verify, and nothing has changed but the time."""
    records = tmp_path / "tuned.jsonl"
    done = hquant("tune", artifact, "--records", records, "--candidates", 2, "--repeat", 1)
    assert done.code == 0, done.err
    assert len(records.read_text().splitlines()) == 1  # the convolution: the dense layer is too small for a choice
    plan = ("--plan", artifact / "plan.json", "--tuning-records", records)
    assert hquant("compile", files / "model.onnx", *plan, "-o", tmp_path / "tuned").code == 0
    assert hquant("verify", tmp_path / "tuned").code == 0
    assert hquant("profile", tmp_path / "tuned", "--repeat", 1).code == 0


def test_targets(files: Path, hquant: Hquant, tmp_path: Path) -> None:
    """List, show, detect and check work together: what is detected is valid and can be shown."""
    assert "generic-int8-npu" in hquant("targets", "list").out
    assert "integers only" in hquant("targets", "show", "generic-int8-npu").out
    assert hquant("targets", "detect", "-o", tmp_path / "host.toml").code == 0
    assert "host.toml: valid" in hquant("targets", "check", tmp_path / "host.toml").out
    assert hquant("targets", "show", tmp_path / "host.toml").code == 0


def test_quickstart(hquant: Hquant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first command that anybody runs, as it is shipped: the digits are recognised, and what it names is there."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = hquant("quickstart")
    assert done.code == 0, done.err
    right = re.search(r"the compiled module has ([\d.]+)% of all 539 evaluation digits right", done.out)
    assert right is not None
    assert float(right[1]) > 97
    folder = re.search(r"its artifact is (.*)", done.out)
    assert folder is not None
    assert (Path(folder[1]) / "plan.json").is_file()


# Mistakes.


MISTAKES: dict[str, tuple[str, str]] = {
    "no such model": ("compile none.onnx -o out --precision float32", "none.onnx"),
    "a model that is none": ("compile garbage.onnx -o out --precision float32", "garbage.onnx"),
    "a folder as model": ("compile other -o out --precision float32", "other"),
    "unknown target": ("compile model.onnx -o out --precision float32 --target abacus", "abacus"),
    "broken target": ("inspect model.onnx --target garbage.toml", "garbage.toml"),
    "unknown precision": ("compile model.onnx -o out --calibration data.npz --precision a9w9w9", "a9w9w9"),
    "precision not on the target": (
        "compile model.onnx -o out --precision float16 --target generic-int8-npu", "generic-int8-npu",
    ),
    "integers without data": ("compile model.onnx -o out --precision a8w8", "needs calibration data"),
    "a search without data": ("compile model.onnx -o out", "no calibration data"),
    "missing data": ("compile model.onnx -o out --calibration none.npz", "none.npz"),
    "data that are none": ("compile model.onnx -o out --calibration garbage.npz", "garbage.npz"),
    "data of another shape": ("compile model.onnx -o out --calibration wrong.npz", "wrong.npz"),
    "data without samples": ("compile model.onnx -o out --calibration empty.npz", "empty.npz"),
    "data with NaN": ("compile model.onnx -o out --calibration nan.npz", "nan.npz"),
    "unknown metric": ("compile model.onnx -o out --calibration data.npz --metric beauty", "beauty"),
    "top1 without labels": ("compile model.onnx -o out --calibration data.npz --metric top1", "labels"),
    "unknown observer": ("compile model.onnx -o out --calibration data.npz --observer guess", "guess"),
    "plan and precision": ("compile model.onnx -o out --plan p.json --precision a8w8", "exclude each other"),
    "missing plan": ("compile model.onnx -o out --plan p.json", "p.json"),
    "wrong shapes": ("inspect model.onnx --input-shapes 3x3", "3x3"),
    "shapes of another input": ("inspect model.onnx --input-shapes z:[1,2,6,6]", "z"),
    "output folder in use": ("compile model.onnx -o other --precision float32", "other"),
    "output is a file": ("compile model.onnx -o data.npz --precision float32", "data.npz"),
    "no artifact": ("run other -i data.npz", "other"),
    "missing artifact": ("verify none", "none"),
    "profile without data": ("profile model.onnx", "--calibration"),
    "profile of a folder that is no artifact": ("profile other", "not an artifact"),
    "profile into no folder": ("profile model.onnx --calibration data.npz --json no/such/file.json", "no folder"),
    "tuning records that are none": ("compile model.onnx -o out --precision w4 --tuning-records garbage.toml", "line 1"),
    "no tuning records": ("compile model.onnx -o out --precision w4 --tuning-records none.jsonl", "none.jsonl"),
    "targets show of nothing": ("targets show abacus", "abacus"),
    "targets check of garbage": ("targets check garbage.toml", "garbage.toml"),
    "detect into nowhere": ("targets detect -o none/host.toml", "none/host.toml"),
    "dump into a file": ("compile model.onnx -o out --precision float32 --dump-ir data.npz", "data.npz"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.replace(" ", "-"))
def test_mistakes_are_one_line(case: str, files: Path, hquant: Hquant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2, one line that names what is wrong, no traceback, and nothing left behind."""
    command, named = MISTAKES[case]
    monkeypatch.chdir(files)
    done = hquant(*command.split())
    assert done.code == 2, done.out + done.err
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("hquant: ")
    assert named in lines[0]
    assert not (files / "out").exists()


def test_mistakes_with_an_artifact(files: Path, artifact: Path, hquant: Hquant, tmp_path: Path) -> None:
    """Wrong inputs for a good artifact, and a place that cannot be written to."""
    for inputs, named in (
        (files / "wrong.npz", "x"),
        (files / "none.npz", "none.npz"),
        (files / "garbage.npz", "garbage"),
    ):
        done = hquant("run", artifact, "-i", inputs)
        assert (done.code, len(done.err.strip().splitlines())) == (2, 1), done.err
        assert named in done.err
    done = hquant("run", artifact, "-i", files / "data.npz", "-o", tmp_path / "no" / "folder.npz")
    assert (done.code, done.err.startswith("hquant: cannot write")) == (2, True)
    done = hquant("verify", artifact, "--rpc", "nowhere")
    assert (done.code, "HOST:PORT" in done.err) == (2, True)
    done = hquant("tune", artifact, "--records", tmp_path / "tuned.jsonl", "--rpc", "nowhere")
    assert (done.code, "HOST:PORT" in done.err) == (2, True)
    assert not (tmp_path / "tuned.jsonl").exists()
    done = hquant("tune", artifact, "--records", tmp_path / "no" / "tuned.jsonl")
    assert (done.code, done.err.startswith("hquant: cannot write the tuning records")) == (2, True)


def test_usage_errors_are_short(hquant: Hquant) -> None:
    """What the option parser itself finds: exit code 2 and a pointer to --help."""
    for arguments in (("compile",), ("run",), ("nonsense",), ("compile", "a.onnx", "-o", "b", "--max-drop", "much")):
        done = hquant(*arguments)
        assert done.code == 2
        assert "--help" in done.err
        assert "Traceback" not in done.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """For reports of bugs: --debug anywhere, or HQUANT_DEBUG, lets the exception out."""
    monkeypatch.setattr(sys, "argv", ["hquant", "inspect", "none.onnx", "--debug"])
    with pytest.raises(HQuantError, match=r"none\.onnx"):
        main()
    monkeypatch.setattr(sys, "argv", ["hquant", "inspect", "none.onnx"])
    monkeypatch.setenv("HQUANT_DEBUG", "1")
    with pytest.raises(HQuantError, match=r"none\.onnx"):
        main()


def test_as_a_program() -> None:
    """In a process of its own: one line on standard error and nothing on standard output."""
    command = [sys.executable, "-m", "tvm_hquant.cli.main", "verify", "no-such-folder"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("hquant: no-such-folder is not an artifact")
    assert len(done.stderr.splitlines()) == 1


# Arguments.


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("x:[1,3,224,224]", {"x": (1, 3, 224, 224)}),
        ("a:[1, 2] b:[3]", {"a": (1, 2), "b": (3,)}),
        ("serving::input:[1]", {"serving::input": (1,)}),
        (None, None),
    ],
)
def test_input_shapes(text: str | None, shapes: dict[str, tuple[int, ...]] | None) -> None:
    """One or several inputs, with blanks where people put them, and names with colons."""
    assert parse_input_shapes(text) == shapes


@pytest.mark.parametrize("text", ["x", "x:[1,3", "x:1,3", "x:[a]", "[1,3]", "x:[1]y:[2"])
def test_wrong_input_shapes(text: str) -> None:
    """The form that is expected is shown."""
    with pytest.raises(ModelError, match=r'write "input:\[1,3,224,224\]"'):
        parse_input_shapes(text)


def test_inputs_from_files(files: Path) -> None:
    """Labels are no input, one array has no name, and two inputs need names."""
    assert set(read_inputs(files / "labelled.npz", ["x"])) == {"x"}
    assert set(read_inputs(files / "labelled.npz", ["x", "labels"])) == {"x", "labels"}
    assert set(read_inputs(files / "images.npy", ["x"])) == {"x"}
    with pytest.raises(DataError, match=r"give a \.npz file"):
        read_inputs(files / "images.npy", ["x", "z"])
