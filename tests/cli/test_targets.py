"""``hquant targets``: lists, shows, detects and checks specs."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.target_spec.spec_content import on_linux, spec
from tvm_hquant.cli.targets import targets_app
from tvm_hquant.errors import TargetSpecError
from tvm_hquant.kernels.instruction_set import instruction_set_names
from tvm_hquant.target_spec import detect_host, list_target_specs, load_target_spec

SHIPPED = list_target_specs()


def run(*arguments: str) -> str:
    result = CliRunner().invoke(targets_app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_list() -> None:
    """Protects 'hquant targets list': every shipped spec on one plain line of its own."""
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(SHIPPED)


@on_linux
def test_instruction_sets() -> None:
    """Protects 'hquant targets instruction-sets': every one with what it needs, a better one before a worse."""
    lines = [line.split() for line in run("instruction-sets").splitlines()[1:]]
    assert {words[0] for words in lines} == set(instruction_set_names())
    assert ["avx2", "llvm", "avx2,", "fma"] in [words[:4] for words in lines]
    names = [words[0] for words in lines]
    assert names.index("avx512_vnni") < names.index("avx2")


def test_show() -> None:
    """Protects 'hquant targets show': rates, reasons and hash, uncut where no terminal is."""
    text = run("show", "generic-int8-npu")
    npu = load_target_spec("generic-int8-npu")
    assert npu.spec_hash() in text
    assert "a16w16 256" in text
    assert npu.rules.forbidden[0].reason in text
    assert "\x1b" not in text


@on_linux
def test_detect_check_and_use(tmp_path: Path) -> None:
    """Protects the guide's path: detect writes a file that check accepts and load reads."""
    path = tmp_path / "mine.toml"
    assert str(path) in run("detect", "-o", str(path))
    assert path.read_text().startswith("# Detected")
    assert f"{path}: valid" in run("check", str(path))
    assert load_target_spec(path).spec_hash() == detect_host().spec_hash()
    with pytest.raises(TargetSpecError, match="cannot write"):
        run("detect", "-o", str(tmp_path / "no" / "folder.toml"))


def test_check_finds_what_reading_cannot(tmp_path: Path) -> None:
    """Protects 'hquant targets check': LLVM's names are checked, idle units and a missing compiler are told."""
    path = tmp_path / "board.toml"
    path.write_text(spec(target={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "corte"}).to_toml())
    with pytest.raises(TargetSpecError, match=r"board\.toml: .*mcpu"):
        run("check", str(path))
    rules = {"forbidden": [{"precision": "*float32", "reason": "none"}, {"precision": "w8", "reason": "none"}]}
    compilers = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "cross_compiler": "no-such-compiler"}
    path.write_text(spec(rules=rules, target=compilers).to_toml())
    text = run("check", str(path))
    assert "no work to the units floats" in text
    assert "no-such-compiler is not on this machine's PATH" in text
