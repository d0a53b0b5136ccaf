"""Declarations of instruction sets: how they are found, and that one file and a spec make a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_hquant.cpu_features import normalize_feature
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.instruction_set import (
    InstructionSet,
    instruction_set_names,
    load_instruction_set,
    load_instruction_sets,
)
from tvm_hquant.target_spec import load_target_spec

ROOT = Path(__file__).parents[2]

NEW_SET = '''
"""Two-way sums of any processor, in vectors of eight."""

from tvm_hquant.kernels.anchor_family import AnchorFamily
from tvm_hquant.kernels.dot_product import FloatDot, WideningDot
from tvm_hquant.kernels.instruction_set import Host, InstructionSet


def _dot(request):
    if request.weights == "int8":
        return WideningDot(8, 16)
    return FloatDot(8, 16, request.weights) if request.weights == "float32" else None


INSTRUCTION_SET = InstructionSet(
    (AnchorFamily("wide_vectors", _dot, 8),), host=Host(None, SPEC), preference=1000
)
'''

SESSION = """
import sys
from pathlib import Path
import numpy as np

in_package, folder = sys.argv[1] == "package", Path(sys.argv[2])
if in_package:
    from tvm_hquant.kernels import instruction_sets

    # What a file in the package's own folder would do.
    instruction_sets.__path__.append(str(folder))

from tests.planned_models import one_sample, partitioned, named_plan, shared_session
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.kernels.registry import host_instruction_sets
from tvm_hquant.target_spec import list_target_specs, load_target_spec, read_target_spec
from tvm_hquant.verification import verify_artifact

file = folder / "new_specs" / "new-processor.toml"
if in_package:
    spec = load_target_spec(file)
else:
    assert "new-processor" in list_target_specs()
    spec = load_target_spec("new-processor")
    assert load_target_spec("host").instruction_sets == spec.instruction_sets, "detection prefers it"
assert host_instruction_sets()[0] == "wide_vectors"
artifact = compile_artifact(partitioned("residual"), named_plan("residual", "a8w8"), spec)
assert verify_artifact(artifact, [one_sample(shared_session("residual"))]).holds
print(*(layer["kernel"] for layer in artifact.manifest["layers"]))
"""


@pytest.mark.parametrize("home", ["package", "distribution"])
def test_one_file_and_its_spec_add_an_instruction_set(home: str, tmp_path: Path) -> None:
    """A module in the package, or one that another distribution names, is compiled with, agrees with NumPy bit for bit,
    and is what detection finds: no other file knows of it."""
    (tmp_path / "wide_vectors.py").write_text(
        NEW_SET.replace("SPEC", "None" if home == "package" else '"new-processor"')
    )
    specs = tmp_path / "new_specs"
    specs.mkdir()
    portable = load_target_spec("portable-cpu").to_toml()
    portable = portable.replace('name = "portable-cpu"', 'name = "new-processor"')
    (specs / "new-processor.toml").write_text(
        portable.replace(
            'instruction_sets = ["portable", "reference"]', 'instruction_sets = ["wide_vectors", "portable"]'
        )
    )
    paths = [str(ROOT)]
    if home == "distribution":
        paths.append(str(tmp_path))
        (specs / "__init__.py").touch()
        metadata = tmp_path / "new_processor-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: new-processor\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(
            "[tvm_hquant.instruction_sets]\nwide_vectors = wide_vectors\n[tvm_hquant.target_specs]\nnew = new_specs\n"
        )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", SESSION, home, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wide_vectors.conv2d" in done.stdout


def test_listing_imports_nothing() -> None:
    """``hquant targets`` and the check of a spec's names do not wait for TVM."""
    code = (
        "import sys; from tvm_hquant.kernels.instruction_set import instruction_set_names as names; "
        "from tvm_hquant.target_spec import load_target_spec; load_target_spec('x86-64-avx2'); "
        "assert 'avx2' in names() and 'tvm' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_order_is_that_of_preference() -> None:
    """The order in which detection asks, and that of names, are the same on every machine."""
    names = [found.name for found in load_instruction_sets()]
    assert sorted(names) == list(instruction_set_names())
    for better, worse in (("avx512_bf16", "avx512_vnni"), ("avx512_vnni", "avx_vnni"), ("avx_vnni", "avx2"),
                          ("arm_bf16", "arm_i8mm"), ("arm_i8mm", "arm_dotprod"), ("arm_dotprod", "arm_neon"),
                          ("arm_neon", "portable"), ("avx2", "portable")):  # fmt: skip
        assert names.index(better) < names.index(worse)


@pytest.mark.parametrize("name", instruction_set_names())
def test_declarations(name: str) -> None:
    """Features are spelled as detection reads them, and a host's spec starts with the set that names it."""
    found = load_instruction_set(name)
    assert {normalize_feature(feature) for feature in found.cpu_features} == found.cpu_features
    if found.host is not None and found.host.spec is not None:
        assert load_target_spec(found.host.spec).instruction_sets[0] == name


def test_wrong_declarations_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name lists the known ones; a module without a declaration is told what it lacks."""
    with pytest.raises(KernelError, match="'avx9': use one of amx, "):
        load_instruction_set("avx9")
    module = sys.modules["tvm_hquant.kernels.instruction_sets.c"]
    load_instruction_set.cache_clear()
    monkeypatch.setattr(module, "INSTRUCTION_SET", InstructionSet(load_instruction_set("avx2").families))
    with pytest.raises(KernelError, match="first family is called c"):
        load_instruction_set("c")
