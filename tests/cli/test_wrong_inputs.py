"""Wrong inputs on the command line: protects the promise of one clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tvm_hquant import quickstart
from tvm_hquant.cli.main import INTERRUPTED, main
from tvm_hquant.target_spec import load_target_spec


@dataclass(frozen=True)
class Outcome:
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str


Hquant = Callable[..., Outcome]
Document = dict[str, Any]


@pytest.fixture
def hquant(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], workshop: Path) -> Hquant:
    """Runs the command line in this process, in a folder with right and wrong files."""
    monkeypatch.chdir(workshop)
    monkeypatch.delenv("HQUANT_DEBUG", raising=False)

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["hquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, its data, and files that are wrong, each in one way."""
    folder = tmp_path_factory.mktemp("wrong")
    data = quickstart.model_path().read_bytes()
    (folder / "model.onnx").write_bytes(data)
    (folder / "truncated.onnx").write_bytes(data[: len(data) // 2])
    (folder / "corrupt.onnx").write_bytes(data[:500] + b"\xff" * 100 + data[600:])
    (folder / "text.onnx").write_text("this is no model\n" * 20, encoding="utf-8")
    custom = onnx.load_model_from_string(data)
    custom.graph.node[1].op_type, custom.graph.node[1].domain = "Magic", "my.company"
    custom.opset_import.append(onnx.helper.make_opsetid("my.company", 1))
    onnx.save(custom, folder / "custom.onnx")
    with np.load(quickstart.calibration_path()) as arrays:
        x, labels = arrays["input"][:16], arrays["labels"][:16]
    x_nan = x.copy()
    x_nan[5, 0, 3, 3] = np.nan
    files: dict[str, dict[str, Any]] = {
        "data": {"input": x, "labels": labels},
        "unlabelled": {"input": x},
        "name": {"image": x},
        "shape": {"input": x[:, :, :4]},
        "text_dtype": {"input": np.array(["seven", "eight"])},
        "objects": {"input": np.array([None, "eight"])},
        "nan": {"input": x_nan},
        "empty": {"input": x[:0]},
        "few_labels": {"input": x, "labels": labels[:9]},
        "large_labels": {"input": x, "labels": labels + 100},
        "one_sample": {"input": x[:1]},
    }
    for name, content in files.items():
        np.savez(folder / f"{name}.npz", **content)
    (folder / "text.npz").write_text("these are no arrays", encoding="utf-8")
    (folder / "cut.npz").write_bytes((folder / "data.npz").read_bytes()[:900])
    (folder / "values.csv").write_text("1,2\n", encoding="utf-8")
    spec = load_target_spec("portable-cpu").to_toml()
    (folder / "field.toml").write_text(spec.replace("bandwidth_gb_per_s", "bandwith_gb_per_s"), encoding="utf-8")
    (folder / "cpu.toml").write_text(
        load_target_spec("x86-64-avx2").to_toml().replace("x86-64-v3", "z80"), encoding="utf-8"
    )
    (folder / "other").mkdir()
    (folder / "other" / "thesis.tex").write_text("years of work", encoding="utf-8")
    (folder / "file").touch()
    return folder


@pytest.fixture
def artifact(workshop: Path, hquant: Hquant) -> Path:
    """An artifact for this machine, compiled once."""
    folder = workshop / "artifact"
    if not folder.exists():
        done = hquant("compile", "model.onnx", "-o", folder, "--calibration", "data.npz", "--precision", "a8w8")
        assert done.code == 0, done.err
    return folder


def copied(artifact: Path, name: str) -> Path:
    """A copy of an artifact, to be damaged."""
    shutil.copytree(artifact, artifact.with_name(name))
    return artifact.with_name(name)


def expect_one_line(done: Outcome, *words: str) -> None:
    """Exit code 2, nothing on standard output, one line on standard error that holds the words."""
    assert done.code == 2, done.err
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("hquant: ")
    for word in words:
        assert word in done.err


COMPILE = "compile model.onnx -o out"
SEARCH = "search model.onnx -o out --calibration data.npz"
MISTAKES: dict[str, tuple[str, tuple[str, ...]]] = {
    # The model.
    "truncated model": ("compile truncated.onnx -o out", ("truncated.onnx", "cut short")),
    "corrupt model": ("compile corrupt.onnx -o out", ("corrupt.onnx",)),
    "text as model": ("compile text.onnx -o out", ("text.onnx", "no ONNX model")),
    "custom operator": ("inspect custom.onnx", ("custom.onnx", "Magic", "my.company")),
    # The data.
    "wrong name": (f"{COMPILE} --calibration name.npz", ("name.npz", "'image'", "'input'")),
    "wrong shape": (f"{COMPILE} --calibration shape.npz", ("shape.npz", "[16, 1, 4, 8]", "[1, 8, 8]")),
    "wrong dtype": (f"{COMPILE} --calibration text_dtype.npz", ("text_dtype.npz", "float32")),
    "objects": (f"{COMPILE} --calibration objects.npz", ("objects.npz", "Python objects")),
    "NaN": (f"{COMPILE} --calibration nan.npz", ("nan.npz", "sample 5", "NaN")),
    "NaN to evaluate with": (f"{COMPILE} --calibration data.npz --evaluation nan.npz", ("nan.npz", "sample 5")),
    "empty": (f"{COMPILE} --calibration empty.npz", ("empty.npz", "no samples")),
    "too few": (f"{COMPILE} --calibration one_sample.npz", ("one_sample.npz", "more samples")),
    "labels of wrong length": (f"{COMPILE} --calibration few_labels.npz", ("few_labels.npz", "[9]", "16")),
    "labels of no class": (f"{COMPILE} --calibration large_labels.npz", ("large_labels.npz", "classes", "10")),
    "text as data": (f"{COMPILE} --calibration text.npz", ("text.npz", "numpy.savez")),
    "table as data": (f"{COMPILE} --calibration values.csv", ("values.csv", ".npz")),
    # The options.
    "shapes without colon": (f"{COMPILE} --input-shapes input=[1,1,8,8]", ('write "input:[1,3,224,224]"',)),
    "shapes of other dimensions": (f"{COMPILE} --input-shapes input:[1,1,9,9]", ("model.onnx", "9", "8")),
    "shapes of other rank": (f"{COMPILE} --input-shapes input:[1,1,8]", ("1×1×8", "4")),
    "target with a typo": (f"{COMPILE} --target cortex-a67", ("cortex-a67", "did you mean cortex-a76")),
    "unknown CPU": (f"{COMPILE} --target cpu.toml", ("z80", "mcpu")),
    "too many bits": (f"{COMPILE} --calibration data.npz --precision a12w17", ("a12w17", "2 to 16 bits")),
    "budget that is no number": (f"{COMPILE} --calibration data.npz --max-drop nan", ("max_drop",)),
    "floats on integers": (
        f"{COMPILE} --calibration data.npz --precision float16 --target generic-int8-npu",
        ("float16", "generic-int8-npu"),
    ),
    # Searches.
    "search without data": ("search model.onnx -o out", ("--calibration",)),
    "search with labels of no class": (
        f"{SEARCH} --evaluation large_labels.npz",
        ("large_labels.npz, sample 0", "10 classes", "count from 0"),
    ),
    "search by labels that are not there": (
        f"{SEARCH} --evaluation unlabelled.npz --metric top1",
        ("top1 needs labels", "kl"),
    ),
    "search with NaN": (f"{SEARCH} --evaluation nan.npz", ("nan.npz", "sample 5", "NaN")),
    "search with one sample": (f"{SEARCH} --evaluation one_sample.npz", ("one_sample.npz", "more samples")),
    "search by no strategy": (f"{SEARCH} --strategy annealing", ("'annealing'", "lazy-greedy", "ilp")),
    "search for no objective": (f"{SEARCH} --objective energy", ("'energy'", "latency, size, macs")),
    "search among no precision": (f"{SEARCH} --precisions a8w88", ("a8w88", "bfloat16")),
    "search among none": (f"{SEARCH} --precisions ,", ("--precisions", "names none")),
    "search with no observer": (f"{SEARCH} --observer median", ("'median'", "percentile")),
    "search into a file": ("search model.onnx -o file --calibration data.npz", ("file is a file",)),
    "search below a file": ("search model.onnx -o file/front --calibration data.npz", ("file/front", "file is a file")),
    "text as journal": (f"{SEARCH} --journal values.csv", ("values.csv", "journal")),
    "folder as journal": (f"{SEARCH} --journal other", ("other", "journal")),
    # Places.
    "folder in use": ("compile model.onnx -o other --precision w8", ("other", "other files")),
    "below a file": ("compile model.onnx -o file/out --precision w8", ("file/out", "is a file")),
    "file as artifact": ("run model.onnx -i data.npz", ("model.onnx", "a file")),
    "dump below a file": (f"{COMPILE} --precision w8 --dump-ir file/ir", ("--dump-ir", "file/ir")),
}


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: case.replace(" ", "-"))
def test_mistakes(case: str, hquant: Hquant, workshop: Path) -> None:
    """The line names what is wrong, and the output folder does not appear."""
    command, words = MISTAKES[case]
    before = {path.name for path in workshop.iterdir()}
    expect_one_line(hquant(*command.split()), *words)
    assert {path.name for path in workshop.iterdir()} == before
    assert (workshop / "other" / "thesis.tex").read_text(encoding="utf-8") == "years of work"


def test_wrong_fields_of_a_spec_are_all_named(hquant: Hquant) -> None:
    """A misspelt field is missing and unknown at once: both are said, with the right spelling."""
    done = hquant("compile", "model.onnx", "-o", "out", "--target", "field.toml")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("hquant: field.toml: 2 wrong fields:")
    assert "did you mean bandwidth_gb_per_s?" in done.err


# Plans.


def _precision(plan: Document) -> None:
    plan["layers"]["stem"]["precision"] = "a8w88x"


def _layer(plan: Document) -> None:
    plan["layers"]["stemm"] = plan["layers"].pop("stem")


def _field(plan: Document) -> None:
    plan["layers"]["stem"]["precison"] = plan["layers"]["stem"].pop("precision")


def _model(plan: Document) -> None:
    plan["model"] = "0" * 64


def _width(plan: Document) -> None:
    plan["layers"]["stem"]["precision"] = "a16w8"


PLANS: dict[str, tuple[Callable[[Document], None], tuple[str, ...]]] = {
    "typo in a precision": (_precision, ("layer stem", "a8w88x", "a8w8")),
    "typo in a layer": (_layer, ("stemm", "write stem for stemm")),
    "typo in a field": (_field, ("layer stem", "'precision' is missing")),
    "another model": (_model, ("for another model",)),
    "16 bits without scales": (_width, ("stem", "uint16", "give calibration data")),
}


@pytest.mark.parametrize("case", PLANS, ids=lambda case: case.replace(" ", "-"))
def test_wrong_plans(case: str, hquant: Hquant, artifact: Path, tmp_path: Path) -> None:
    """What people get wrong when they edit a plan: the layer is named."""
    change, words = PLANS[case]
    document = json.loads((artifact / "plan.json").read_text(encoding="utf-8"))
    change(document)
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    done = hquant("compile", "model.onnx", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out")
    expect_one_line(done, *words)
    assert not (tmp_path / "out").exists()


def test_calibration_completes_an_edited_plan(hquant: Hquant, artifact: Path, tmp_path: Path) -> None:
    """With data, a layer can be promoted to 16 bits by hand: the scales that the plan lacks are calibrated."""
    document = json.loads((artifact / "plan.json").read_text(encoding="utf-8"))
    _width(document)
    (tmp_path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    done = hquant(
        "compile", "model.onnx", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", "--calibration", "data.npz"
    )
    assert done.code == 0, done.err
    made = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert made["layers"]["stem"]["precision"] == "a16w8"
    assert made["tensors"]["input"]["uint8"] == document["tensors"]["input"]["uint8"]
    assert hquant("verify", tmp_path / "out").code == 0


# Artifacts.


def _edit_target(artifact: Path, **changes: Any) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    manifest["target"].update(changes)
    (artifact / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


DAMAGES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "no manifest": (lambda a: (a / "manifest.json").unlink(), ("manifest.json",)),
    "cut manifest": (lambda a: os.truncate(a / "manifest.json", 300), ("manifest.json", "compile the model again")),
    "no library": (lambda a: (a / "model.so").unlink(), ("model.so is missing",)),
    "cut library": (lambda a: os.truncate(a / "model.so", 5000), ("model.so", "damaged")),
    "another machine": (
        lambda a: _edit_target(a, name="cortex-a76", machine="mips"), ("cortex-a76", "mips", "--target host"),
    ),
    "another CPU": (lambda a: _edit_target(a, required_cpu_features=["warp_drive"]), ("warp_drive", "--target host")),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.replace(" ", "-"))
def test_artifacts_that_cannot_run(case: str, hquant: Hquant, artifact: Path) -> None:
    """A library that is cut short ended the process with a bus error; instructions that are missing would too."""
    damage, words = DAMAGES[case]
    damaged = copied(artifact, case.replace(" ", "-"))
    damage(damaged)
    try:
        expect_one_line(hquant("run", damaged, "-i", "data.npz"), *words)
        expect_one_line(hquant("verify", damaged), *words)
    finally:
        shutil.rmtree(damaged)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("name.npz", ("input is missing", "image is unknown")),
        ("shape.npz", ("input", "16×1×4×8", "samples×1×8×8")),
        ("text_dtype.npz", ("input",)),
        ("objects.npz", ("objects.npz", "Python objects")),
        ("empty.npz", ("no samples",)),
        ("text.npz", ("text.npz",)),
        ("cut.npz", ("cut.npz",)),
        ("none.npz", ("none.npz", "no such file")),
    ],
)
def test_wrong_inputs_to_run(inputs: str, words: tuple[str, ...], hquant: Hquant, artifact: Path) -> None:
    """The same clear words as for calibration data."""
    expect_one_line(hquant("run", artifact, "-i", inputs), *words)


def test_outputs_go_where_they_should(hquant: Hquant, artifact: Path, tmp_path: Path) -> None:
    """To exactly the file that was named; a full disk is said to be full."""
    assert hquant("run", artifact, "-i", "data.npz", "-o", tmp_path / "outputs").code == 0
    with np.load(tmp_path / "outputs") as arrays:
        assert arrays["logits"].shape == (16, 10)
    if Path("/dev/full").exists():
        done = hquant("run", artifact, "-i", "data.npz", "-o", "/dev/full")
        expect_one_line(done, "/dev/full", os.strerror(28))


# The machine.


def test_missing_compilers(hquant: Hquant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said at once, not after minutes of searching: the program, and the package that has it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    compiling = ("compile", "model.onnx", "-o", "out", "--calibration", "none.npz")
    expect_one_line(hquant(*compiling, "--target", "cortex-a72"), "aarch64-linux-gnu-gcc", "Debian")
    expect_one_line(hquant(*compiling), "no C compiler")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(hquant: Hquant, tmp_path: Path) -> None:
    """Before the search, too."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    done = hquant("compile", "model.onnx", "-o", locked / "out", "--calibration", "none.npz")
    expect_one_line(done, str(locked), "not writable")


def test_full_disk(workshop: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that is full: no part of an artifact is left."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = _command("compile", "model.onnx", "-o", tmp_path / "out", "--precision", "w8")
    done = subprocess.run(
        command, cwd=workshop, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit_files
    )
    expect_one_line(Outcome(done.returncode, done.stdout, done.stderr), "cannot write")
    assert list(tmp_path.iterdir()) == []


def test_interruption(workshop: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of the work: one line, the shell's exit code, nothing left behind."""
    command = _command("compile", "model.onnx", "-o", tmp_path / "out", "--calibration", quickstart.calibration_path())
    with subprocess.Popen(command, cwd=workshop, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(2.5)
        while process.poll() is None:  # Python loses a signal that comes while it destroys an object
            process.send_signal(signal.SIGINT)
            time.sleep(2)
        out, err = process.communicate(timeout=60)
    # Python ends by the signal itself where it came while a module was imported; shells show 130 for both.
    assert process.returncode in (INTERRUPTED, -signal.SIGINT)
    assert out == ""
    assert "hquant: interrupted; no artifact was written\n" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_help_is_quick() -> None:
    """The options are shown without loading TVM, NumPy or SciPy."""
    code = (
        "import sys; sys.argv = ['hquant', '--help']\n"
        "from tvm_hquant.cli.main import main\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'tvm', 'numpy', 'scipy', 'onnx', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.fixture(autouse=True)
def _signals_are_restored() -> Iterator[None]:
    """The command line leaves Python's own handling of Ctrl-C behind."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tvm_hquant.cli.main", *map(str, arguments)]
