"""Reading specs, and the messages about wrong fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.target_spec.spec_content import content, spec, unit
from tvm_hquant.errors import TargetSpecError
from tvm_hquant.target_spec import list_target_specs, load_target_spec, read_target_spec
from tvm_hquant.target_spec.load import spec_from

WRONG_FIELDS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[str]]] = {
    "unknown field at the top": (lambda c: c.update(memori={}), ["memori: unknown field", "did you mean memory"]),
    "unknown field in a unit": (
        lambda c: c["units"][1].update(clok=1),
        ["units[1].clok: unknown field", "did you mean clock_ghz", "macs_per_cycle"],
    ),
    "unknown field in the target": (
        lambda c: c["target"].update(num_cores=4),
        ["target.num_cores: unknown field", "did you mean num-cores"],
    ),
    "unknown field in the host of a GPU": (
        lambda c: c.update(target={"kind": "cuda", "arch": "sm_87", "host": {"kind": "llvm", "cpu": "x"}}),
        ["target.host.cpu: unknown field", "did you mean mcpu"],
    ),
    "missing table": (lambda c: c.pop("memory"), ["memory: is missing"]),
    "missing field": (lambda c: c["units"][0].pop("clock_ghz"), ["units[0].clock_ghz: is missing"]),
    "other schema version": (lambda c: c.update(schema_version=2), ["schema_version: found 2", "should be 1"]),
    "name with spaces": (lambda c: c.update(name="My Board"), ['name: found "My Board"', "lower-case letters"]),
    "number as text": (
        lambda c: c["memory"].update(bandwidth_gb_per_s="3"),
        ['bandwidth_gb_per_s: found "3"', "number"],
    ),
    "text as number": (lambda c: c.update(description=3), ["description: found 3", "string"]),
    "negative clock": (lambda c: c["units"][0].update(clock_ghz=-1), ["clock_ghz: found -1", "greater than 0"]),
    "infinite rate": (lambda c: c["memory"].update(bandwidth_gb_per_s=float("inf")), ["bandwidth_gb_per_s", "finite"]),
    "fraction of a core": (lambda c: c["units"][0].update(count=1.5), ["units[0].count: found 1.5", "integer"]),
    "unknown operator": (
        lambda c: c["units"][0].update(operators=["convolution"]),
        ['units[0].operators[0]: found "convolution"', "depthwise_conv2d"],
    ),
    "operator twice": (
        lambda c: c["units"][0].update(operators=["add", "add"]),
        ["units[0].operators: lists add more than once"],
    ),
    "no operators": (
        lambda c: c["units"][0].update(operators=[]),
        ["units[0].operators: the list should have at least 1"],
    ),
    "unknown precision": (
        lambda c: c["units"][0].update(macs_per_cycle={"int9": 8}),
        ['units[0].macs_per_cycle.int9: found "int9"', "unknown precision", "a8w8"],
    ),
    "simulated precision": (
        lambda c: c["units"][0].update(macs_per_cycle={"a6w6": 8}),
        ["units[0].macs_per_cycle.a6w6", "no kernel of its own"],
    ),
    "rate of zero": (
        lambda c: c["units"][0].update(macs_per_cycle={"a8w8": 0}),
        ["units[0].macs_per_cycle.a8w8: found 0", "greater than 0"],
    ),
    "no precision": (lambda c: c["units"][0].update(macs_per_cycle={}), ["units[0].macs_per_cycle"]),
    "two units of one name": (lambda c: c["units"][1].update(name="integers"), ["two units are called integers"]),
    "no units": (lambda c: c.update(units=[]), ["units"]),
    "no unit for convolutions": (
        lambda c: c.update(units=[unit("adder", ["add"], {"a8w8": 1})]),
        ["no unit offers any convolution"],
    ),
    "unknown kernel family": (
        lambda c: c.update(instruction_sets=["sse5"]),
        ['instruction_sets[0]: found "sse5"', "avx2"],
    ),
    "unknown format": (
        lambda c: c["conversions"][0].update({"from": "int4"}),
        ['conversions[0].from: found "int4"', "uint16"],
    ),
    "conversion left out": (
        lambda c: c["conversions"][0].update({"to": "uint8"}),
        ["no entry of conversions covers", 'from = "*", to = "*"'],
    ),
    "tag and kind": (lambda c: c["target"].update(tag="x"), ["target: needs either tag", "not both"]),
    "neither tag nor kind": (lambda c: c["target"].pop("kind"), ["target: needs either tag"]),
    "other kind": (lambda c: c["target"].update(kind="vulkan"), ['target.kind: found "vulkan"', "llvm", "cuda"]),
    "GPU without arch": (lambda c: c.update(target={"kind": "cuda"}), ["target: needs arch", "sm_87"]),
    "arch of a CPU": (lambda c: c["target"].update(arch="sm_87"), ["target: arch belongs to"]),
    "feature without sign": (
        lambda c: c["target"].update(mattr=["neon"]),
        ['target.mattr[0]: found "neon"', "+dotprod"],
    ),
    "rule with another word": (
        lambda c: c.update(rules={"weight_scales": "per-layer"}),
        ['rules.weight_scales: found "per-layer"', "per-tensor"],
    ),
    "forbidden without a reason": (
        lambda c: c.update(rules={"forbidden": [{"precision": "float32"}]}),
        ["rules.forbidden[0].reason: is missing"],
    ),
    "forbidden with an empty reason": (
        lambda c: c.update(rules={"forbidden": [{"precision": "float32", "reason": " "}]}),
        ["rules.forbidden[0].reason"],
    ),
    "forbidden pattern of nothing": (
        lambda c: c.update(rules={"forbidden": [{"precision": "q*", "reason": "r"}]}),
        ['rules.forbidden[0].precision: found "q*"', "matches no precision"],
    ),
    "not a table": (lambda c: c.update(memory=3), ["memory: found 3"]),
}


@pytest.mark.parametrize("case", WRONG_FIELDS)
def test_wrong_field_is_named_with_what_is_allowed(case: str) -> None:
    """Protects whoever writes a spec: each mistake gives file, field, what was found, and what is allowed."""
    change, expected = WRONG_FIELDS[case]
    changed = content()
    change(changed)
    with pytest.raises(TargetSpecError) as raised:
        spec_from(changed, "board.toml")
    message = str(raised.value)
    assert message.startswith("board.toml: ")
    for part in expected:
        assert part in message
    assert "pydantic" not in message


def test_all_wrong_fields_at_once() -> None:
    """Protects against mending a file one run at a time."""
    with pytest.raises(TargetSpecError, match="3 wrong fields") as raised:
        spec(name="", memory={}, instruction_sets=["sse5"])
    assert len(str(raised.value).splitlines()) == 4


def test_broken_toml_and_missing_files(tmp_path: Path) -> None:
    """Protects: whatever is wrong with the file itself is a TargetSpecError that names it."""
    with pytest.raises(TargetSpecError, match=r"x\.toml: not a TOML file: .*line 2"):
        read_target_spec("# a spec\nname : x\n", "x.toml")
    missing, binary = tmp_path / "missing.toml", tmp_path / "binary.toml"
    with pytest.raises(TargetSpecError, match=r"missing\.toml: cannot read"):
        load_target_spec(missing)
    binary.write_bytes(b'name = "\xff"')
    with pytest.raises(TargetSpecError, match=r"binary\.toml: not a TOML file: not UTF-8"):
        load_target_spec(str(binary))


def test_unknown_name_lists_the_known() -> None:
    """Protects against a dead end: the message offers the nearest name and all others."""
    with pytest.raises(TargetSpecError, match=r"did you mean cortex-a72\?") as raised:
        load_target_spec("cortex-a72b")
    assert all(name in str(raised.value) for name in (*list_target_specs(), "host"))


def test_a_file_is_found_by_text_and_by_path(tmp_path: Path) -> None:
    """Protects both spellings of a file's place."""
    path = tmp_path / "board.toml"
    path.write_text(spec().to_toml())
    assert load_target_spec(path) == load_target_spec(str(path)) == spec()
