"""Targets of kind ``c``: the library that a C compiler makes of the generated source keeps to the contract."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi

from tests.network_cases import activation_cases, block_cases, merged_cases, operator_cases
from tests.onnx_models import random_inputs
from tests.pipeline_checks import import_model, simulated_outputs, uniform_plan
from tests.planned_models import named_plan, one_sample, partitioned, shared_session, simulated
from tvm_hquant import c_source
from tvm_hquant.artifact import check_linker, compile_artifact
from tvm_hquant.c_source import COMPILER_OPTIONS, SOURCE_NAME, find_c_compiler
from tvm_hquant.errors import PrecisionError, TargetSpecError, ToolchainError
from tvm_hquant.runtime import load_artifact
from tvm_hquant.target_spec import load_target_spec, read_target_spec
from tvm_hquant.verification import verify_artifact

SPEC = load_target_spec("c-source")


@pytest.mark.parametrize("plan", ["a8w8", "int8", "a16w16", "bfloat16", "float32", "w4"])
@pytest.mark.parametrize("model", ["residual", "branches"])
def test_c_gives_what_the_simulator_gives(model: str, plan: str, tmp_path: Path) -> None:
    """Bit for bit: contraction of products, lost digits of constants or aliased floats would show, in softmax first of all."""
    sample = one_sample(shared_session(model))
    artifact = compile_artifact(partitioned(model), named_plan(model, plan), SPEC).save(tmp_path / "c")
    outputs = list(load_artifact(tmp_path / "c").run(sample).values())
    assert all(np.array_equal(a, b) for a, b in zip(outputs, simulated(model, plan), strict=True))
    assert verify_artifact(artifact, [sample]).holds


@pytest.mark.parametrize("precision", ["a8w8", "float32"])
def test_composed_functions_in_c(precision: str, tmp_path: Path) -> None:
    """A function made of steps is a table in codes, and in float32 the same steps, none of them contracted."""
    names = {"softplus", "mish", "selu", "softsign", "thresholdedrelu"}
    merged = merged_cases("functions", [case for case in activation_cases() if case.name in names], 20)
    imported = import_model(merged.model, random_inputs(merged.model))
    plan = uniform_plan(imported.session, precision)
    compile_artifact(imported.session.mod, plan, SPEC).save(tmp_path / "c")
    outputs = list(load_artifact(tmp_path / "c").run(imported.inputs).values())
    for output, expected in zip(outputs, simulated_outputs(imported, plan), strict=True):
        np.testing.assert_array_equal(output, expected)


def test_normalization_in_c(tmp_path: Path) -> None:
    """Layer normalization into codes and floats, and over maps: sums side by side, roots and divisions of the C library."""
    blocks = [case for case in block_cases() if case.name == "transformer"]
    maps = [case for case in operator_cases() if case.name in ("instance_norm", "group_norm")]
    merged = merged_cases("normalization", [*blocks, *maps], 20)
    imported = import_model(merged.model, random_inputs(merged.model))
    plan = uniform_plan(imported.session, "a8w8")
    artifact = compile_artifact(imported.session.mod, plan, SPEC).save(tmp_path / "c")
    outputs = list(load_artifact(tmp_path / "c").run(imported.inputs).values())
    for output, expected in zip(outputs, simulated_outputs(imported, plan), strict=True):
        np.testing.assert_array_equal(output, expected)
    assert "group_normalization" in str(artifact.manifest["layers"])


def test_artifact_holds_source_that_compiles_alone(tmp_path: Path) -> None:
    """``model.c`` is all that another compiler needs, beside TVM's headers, and none finds anything to warn of; the manifest
    vouches for it, and people find their layers in it."""
    artifact = compile_artifact(partitioned("branches"), named_plan("branches", "a8w8"), SPEC)
    source = artifact.folder / SOURCE_NAME
    headers = [str(Path(tvm.__file__).parent / "include"), tvm_ffi.libinfo.find_include_path()]
    includes = [f"-isystem{h}" for h in (*headers, tvm_ffi.libinfo.find_dlpack_include_path())]
    warnings = ("-Wall", "-Wextra", "-pedantic", "-Wredundant-decls", "-Werror")
    command = [find_c_compiler(), *COMPILER_OPTIONS, *warnings, *includes]
    subprocess.run([*command, "-c", source, "-o", tmp_path / "model.o"], check=True)
    head = next(layer["name"] for layer in artifact.manifest["layers"] if "conv2d" in layer["kernel"])
    assert re.search(rf"^// (.*, )?{re.escape(head)}(, .*)?$", source.read_text(), re.MULTILINE)
    assert SOURCE_NAME in artifact.manifest["files"]
    assert "fmaf(" in source.read_text()


def test_no_float16_in_c() -> None:
    """C99 has no such type: the spec does not offer it, and a plan that asks is refused."""
    with pytest.raises(PrecisionError, match="float16"):
        compile_artifact(partitioned("residual"), named_plan("residual", "float16"), SPEC)


def test_missing_compiler_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """``hquant compile`` checks for the compiler first."""
    monkeypatch.setattr(c_source.shutil, "which", lambda _: None)
    with pytest.raises(ToolchainError, match="install gcc"):
        check_linker(SPEC)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('kind = "c"\nmcpu = "cortex-m7"', "mcpu belongs to the C compiler"),
        ('kind = "llvm"', "c does not fit a target of kind llvm"),
    ],
)
def test_wrong_targets_are_explained(wrong: str, message: str) -> None:
    """Options of LLVM with kind c, and C kernels for LLVM."""
    text = SPEC.to_toml().replace('kind = "c"', wrong)
    with pytest.raises(TargetSpecError, match=message):
        read_target_spec(text, "a spec").tvm_target()
