"""Target specs: reading and its error messages, the questions asked of a spec, detection, and the command line."""

from __future__ import annotations

import os
import pickle
import platform
import tomllib
from collections.abc import Callable, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tvm_hquant.cli.targets import targets_app
from tvm_hquant.errors import PrecisionError, TargetSpecError
from tvm_hquant.kernels.instruction_set import instruction_set_names, load_instruction_sets
from tvm_hquant.layers import Layer
from tvm_hquant.operators import Conv2D, Movement, Operator, Window
from tvm_hquant.precision import REALIZED, parse_precision
from tvm_hquant.target_spec import (
    OPERATOR_KINDS,
    OPERATORS_WITH_WEIGHTS,
    STORED_FORMATS,
    Conversion,
    Forbidden,
    Memory,
    Rules,
    Target,
    TargetSpec,
    Unit,
    cpu_features,
    detect_host,
    list_target_specs,
    load_target_spec,
    normalize_feature,
    read_target_spec,
)
from tvm_hquant.target_spec.detect import best_host, cache_sizes_kib
from tvm_hquant.target_spec.load import spec_from
from tvm_hquant.target_spec.toml_text import toml_text

SHIPPED = list_target_specs()
GUIDE = Path(__file__).parent.parent / "docs" / "target-spec.md"
on_linux = pytest.mark.skipif(
    not Path("/proc/cpuinfo").is_file(), reason="reads the CPU's flags, which only Linux lists"
)


def content(**changes: Any) -> dict[str, Any]:
    """A small valid spec as plain data, with top-level fields replaced."""
    return {
        "schema_version": 1,
        "name": "board",
        "description": "a board",
        "target": {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a53", "mattr": ["+neon"]},
        "instruction_sets": ["arm_neon", "portable"],
        "units": [
            unit("integers", ["*conv2d", "dense", "add"], {"a8w8": 8, "int8": 8, "a8w4": 10, "a16w8": 4}),
            unit("floats", ["*"], {"float32": 4, "w8": 4}),
        ],
        "conversions": [{"from": "*", "to": "*", "elements_per_cycle": 2}],
        "memory": {"bandwidth_gb_per_s": 3.5},
    } | changes


def unit(name: str, operators: list[str], rates: dict[str, float], **fields: Any) -> dict[str, Any]:
    return {"name": name, "operators": operators, "clock_ghz": 1.2, "macs_per_cycle": rates, **fields}


def spec(**changes: Any) -> TargetSpec:
    return spec_from(content(**changes), "board.toml")


def target(**changes: Any) -> dict[str, Any]:
    return {"target": {"kind": "llvm", **changes}, "instruction_sets": ["portable"]}


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
        ["units[0].macs_per_cycle.a6w6", "only simulated"],
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


class TestReading:
    @pytest.mark.parametrize("case", WRONG_FIELDS)
    def test_wrong_field_is_named_with_what_is_allowed(self, case: str) -> None:
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

    def test_all_wrong_fields_at_once(self) -> None:
        """Protects against mending a file one run at a time."""
        with pytest.raises(TargetSpecError, match="3 wrong fields") as raised:
            spec(name="", memory={}, instruction_sets=["sse5"])
        assert len(str(raised.value).splitlines()) == 4

    def test_broken_toml_and_missing_files(self, tmp_path: Path) -> None:
        """Protects: whatever is wrong with the file itself is a TargetSpecError that names it."""
        with pytest.raises(TargetSpecError, match=r"x\.toml: not a TOML file: .*line 2"):
            read_target_spec("# a spec\nname : x\n", "x.toml")
        missing, binary = tmp_path / "missing.toml", tmp_path / "binary.toml"
        with pytest.raises(TargetSpecError, match=r"missing\.toml: cannot read"):
            load_target_spec(missing)
        binary.write_bytes(b'name = "\xff"')
        with pytest.raises(TargetSpecError, match=r"binary\.toml: not a TOML file: not UTF-8"):
            load_target_spec(str(binary))

    def test_unknown_name_lists_the_known(self) -> None:
        """Protects against a dead end: the message offers the nearest name and all others."""
        with pytest.raises(TargetSpecError, match=r"did you mean cortex-a72\?") as raised:
            load_target_spec("cortex-a72b")
        assert all(name in str(raised.value) for name in (*SHIPPED, "host"))

    def test_a_file_is_found_by_text_and_by_path(self, tmp_path: Path) -> None:
        """Protects both spellings of a file's place."""
        path = tmp_path / "board.toml"
        path.write_text(spec().to_toml())
        assert load_target_spec(path) == load_target_spec(str(path)) == spec()


class TestQuestions:
    def test_preference_is_the_order_of_the_file(self) -> None:
        """Protects the documented order: units as listed, precisions as listed, the first mention counts."""
        assert spec().offered_precisions("conv2d") == ("a8w8", "int8", "a8w4", "a16w8", "float32", "w8")
        reordered = spec(units=list(reversed(content()["units"])))
        assert reordered.offered_precisions("conv2d") == ("float32", "w8", "a8w8", "int8", "a8w4", "a16w8")

    def test_operators_without_weights(self) -> None:
        """Protects that weight bits mean nothing to an addition: one name per format, every equal name accepted."""
        board = spec()
        assert board.offered_precisions("add") == ("a8w8", "int8", "a16w8", "float32")
        for name in ("a8w8", "a8w2", "a16w16", "w3", "uint8"):
            assert board.reason_against(name, "add") is None
        assert board.macs_per_cycle("a8w2", "add") == board.macs_per_cycle("a8w4", "add") == 10

    def test_no_unit(self) -> None:
        """Protects the reason shown where hardware lacks something."""
        assert spec().reason_against("float16", "conv2d") == "no unit of board computes conv2d in float16"
        assert spec().reason_against("a8w8", "softmax") == "no unit of board computes softmax in a8w8"
        assert spec().offered_precisions("softmax") == ("float32",)

    def test_forbidden_shows_its_reason(self) -> None:
        """Protects forbidden entries: patterns, exceptions, and the reason in the author's words."""
        rules = {
            "forbidden": [
                {"precision": "a8*", "operators": ["*conv2d"], "except_operators": ["conv2d"], "reason": "too coarse"}
            ]
        }
        board = spec(rules=rules)
        assert board.reason_against("a8w4", "depthwise_conv2d") == (
            "the spec board forbids a8w4 for depthwise_conv2d: too coarse"
        )
        assert board.offered_precisions("grouped_conv2d") == ("int8", "a16w8", "float32", "w8")
        assert board.reason_against("a8w4", "conv2d") is None
        with pytest.raises(PrecisionError, match="too coarse"):
            board.macs_per_cycle("a8w4", "depthwise_conv2d")

    def test_keep_float(self) -> None:
        """Protects rules.keep_float: operator kinds and layer names, other layers untouched."""
        board = spec(rules={"keep_float": ["dense", "head/*"]})
        assert board.offered_precisions("dense") == ("float32",)
        assert board.offered_precisions("conv2d", "head/conv") == ("float32",)
        assert board.offered_precisions("conv2d", "stem/conv") == spec().offered_precisions("conv2d")
        assert "keeps head/* in float" in str(board.reason_against("w8", "conv2d", "head/conv"))
        assert board.keeps_float("dense")
        assert not board.keeps_float("conv2d", "stem/head/conv")

    def test_symmetric_only(self) -> None:
        """Protects hardware without zero points: of the integer precisions int8 alone is left."""
        board = spec(rules={"symmetric_activations_only": True})
        assert board.offered_precisions("conv2d") == ("int8", "float32", "w8")
        assert "symmetric" in str(board.reason_against("a16w8", "conv2d"))

    def test_fastest_unit_counts(self) -> None:
        """Protects cost predictions: where two units offer a precision, the faster one's rate, clock and count hold."""
        slow = unit("slow", ["*"], {"a8w8": 100}, clock_ghz=0.1)
        fast = unit("fast", ["*"], {"a8w8": 8}, clock_ghz=2.0, count=4)
        board = spec(units=[slow, fast, unit("floats", ["*"], {"float32": 1})])
        assert board.unit_for("a8w8", "dense").name == "fast"
        assert board.macs_per_cycle("a8w8", "dense") == 8
        assert board.macs_per_second("a8w8", "dense") == pytest.approx(8 * 2e9 * 4)
        assert board.macs_per_second("a8w8", "dense", cores=1) == pytest.approx(8 * 2e9)

    def test_conversions_first_entry_counts(self) -> None:
        """Protects the documented precedence of conversions."""
        entries = [
            {"from": "float32", "to": "*int*", "elements_per_cycle": 1},
            {"from": "*", "to": "*", "elements_per_cycle": 2},
        ]
        board = spec(conversions=entries)
        assert board.conversion_elements_per_cycle("float32", "uint16") == 1
        assert board.conversion_elements_per_cycle("uint8", "float32") == 2

    def test_unknown_words_are_errors(self) -> None:
        """Protects against a typing mistake in a query that would read as 'not offered'."""
        with pytest.raises(TargetSpecError, match="unknown operator 'conv3d'"):
            spec().offered_precisions("conv3d")
        with pytest.raises(PrecisionError, match="unknown precision"):
            spec().reason_against("int9", "conv2d")
        assert "simulated only" in str(spec().reason_against("a6w5", "conv2d"))

    def test_features_needed_come_from_everywhere(self) -> None:
        """Protects loading: features of the spec, the units and the kernel families are all checked."""
        board = spec(
            required_cpu_features=["AES"],
            units=[*content()["units"], unit("m", ["*"], {"int8": 64}, required_features=["i8mm"])],
        )
        assert board.cpu_features_needed() == {"aes", "i8mm", "asimd"}
        assert board.missing_features({"neon", "i8mm"}) == {"aes"}


class TestIdentity:
    @pytest.mark.parametrize("name", SHIPPED)
    def test_round_trip(self, name: str) -> None:
        """Protects that a written spec is the same spec, and that a spec travels to other processes."""
        shipped = load_target_spec(name)
        again = read_target_spec(shipped.to_toml(), "again")
        assert again == shipped
        assert again.spec_hash() == shipped.spec_hash()
        assert pickle.loads(pickle.dumps(shipped)) == shipped
        assert len({shipped, again}) == 1

    def test_hash_follows_what_decides_plans(self) -> None:
        """Protects plans against another target, and against refusals because a bandwidth was measured anew."""
        same = [spec(description="another"), spec(memory={"bandwidth_gb_per_s": 3.6}), spec()]
        assert {s.spec_hash() for s in same} == {spec().spec_hash()}
        reordered = content()
        rates = reordered["units"][0]["macs_per_cycle"]
        reordered["units"][0]["macs_per_cycle"] = dict(reversed(rates.items()))
        others = [
            spec(rules={"power_of_two_scales": True}),
            spec(instruction_sets=["portable", "arm_neon"]),
            spec(name="other"),
            spec(memory={"bandwidth_gb_per_s": 3.5, "ram_mib": 64}),
            spec_from(reordered, "board.toml"),
        ]
        assert len({s.spec_hash() for s in (*others, spec())}) == 6

    def test_specs_do_not_change(self) -> None:
        """Protects against a pass that edits what others share."""
        with pytest.raises(ValueError, match="frozen"):
            spec().name = "other"

    @settings(max_examples=40, deadline=None)
    @given(
        st.recursive(
            st.text(max_size=8)
            | st.booleans()
            | st.integers(-(2**62), 2**62)
            | st.floats(allow_nan=False, allow_infinity=False),
            lambda values: st.lists(values, max_size=3),
            max_leaves=5,
        ),
        st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    )
    def test_written_toml_is_read_back(self, value: Any, table: dict[str, int]) -> None:
        """Protects the writer over all of TOML's text, keys and numbers: what is written is what is read."""
        try:
            for text in (str(value), *table):
                text.encode()
        except UnicodeEncodeError:
            return
        document = {"value": value, "table": table, "tables": [{"inner": table}, {"x": value}]}
        assert tomllib.loads(toml_text(document)) == document


class TestShipped:
    def test_all_are_there(self) -> None:
        """Protects the promised list, and that packaging carries the data files."""
        assert {
            "x86-64-avx2",
            "x86-64-avx-vnni",
            "x86-64-avx512-vnni",
            "x86-64-avx512-bf16",
            "x86-64-amx",
            "cortex-a53",
            "cortex-a72",
            "neoverse-v1",
            "apple-m1",
            "riscv-rvv",
            "cuda-sm75",
            "cuda-sm80",
            "cortex-a76",
            "jetson-orin",
            "cuda-sm90",
            "generic-int8-npu",
        } <= set(SHIPPED)

    @pytest.mark.parametrize("name", SHIPPED)
    def test_valid_and_known_to_tvm(self, name: str) -> None:
        """Protects every shipped spec: its name is its file's, and TVM and LLVM know its target, CPU and features."""
        shipped = load_target_spec(name)
        assert shipped.name == name
        kinds = {"jetson-orin": "cuda", "cuda-sm75": "cuda", "cuda-sm80": "cuda", "cuda-sm90": "cuda", "c-source": "c"}
        assert shipped.tvm_target().kind.name == kinds.get(name, "llvm")

    @pytest.mark.parametrize("name", SHIPPED)
    def test_nothing_unoffered_is_listed(self, name: str) -> None:
        """Protects plans: what is listed has a rate and no reason against it; what is not listed has a reason."""
        shipped = load_target_spec(name)
        for kind in OPERATOR_KINDS:
            offered = shipped.offered_precisions(kind)
            assert len(set(offered)) == len(offered)
            for precision in REALIZED:
                reason = shipped.reason_against(precision, kind)
                if precision in offered:
                    assert reason is None
                    assert shipped.macs_per_cycle(precision, kind) > 0
                elif kind in OPERATORS_WITH_WEIGHTS:
                    assert reason
                if reason:
                    with pytest.raises(PrecisionError):
                        shipped.macs_per_cycle(precision, kind)

    @pytest.mark.parametrize("name", [n for n in SHIPPED if n != "generic-int8-npu"])
    def test_processors_offer_everything(self, name: str) -> None:
        """Protects that general processors offer all realized precisions to layers with weights; C99 has no float16."""
        expected = set(REALIZED) - ({"float16"} if name == "c-source" else set())
        for kind in OPERATORS_WITH_WEIGHTS:
            assert set(load_target_spec(name).offered_precisions(kind)) == expected

    @pytest.mark.parametrize("name", SHIPPED)
    def test_codes_flow_through_operators_without_weights(self, name: str) -> None:
        """Protects networks from refusals and conversions: what has a kernel for 8-bit codes is offered by every spec."""
        shipped = load_target_spec(name)
        in_floats = {"softmax", "local_response_normalization", "opaque"}
        refused = [kind for kind in OPERATOR_KINDS if kind not in in_floats and shipped.reason_against("a8w8", kind)]
        assert refused == []

    def test_npu_offers_no_float(self) -> None:
        """Protects the int8-only target: integers everywhere, floats only where tensors enter and leave."""
        npu = load_target_spec("generic-int8-npu")
        for kind in OPERATOR_KINDS:
            floats = [name for name in npu.offered_precisions(kind) if not parse_precision(name).is_integer]
            assert floats == (["float32"] if kind == "convert" else [])
        for kind in OPERATORS_WITH_WEIGHTS:
            assert {"a8w8", "int8", "a8w4", "a16w8", "a16w16"} <= set(npu.offered_precisions(kind))
            assert "computes integers only" in str(npu.reason_against("bfloat16", kind))
            assert "computes integers only" in str(npu.reason_against("w4", kind))
        assert npu.macs_per_cycle("a16w8", "dense") * 2 == npu.macs_per_cycle("a8w8", "dense")
        assert npu.is_host_compatible()

    def test_two_passes_cost_twice(self) -> None:
        """Protects the cost of 16 bits on int8 units, which the arithmetic fixes: two and four passes."""
        for name in SHIPPED:
            shipped = load_target_spec(name)
            for kind in OPERATORS_WITH_WEIGHTS:
                base = shipped.macs_per_cycle("a8w8", kind)
                assert shipped.macs_per_cycle("a16w8", kind) == base / 2
                assert shipped.macs_per_cycle("a16w16", kind) == base / 4

    @pytest.mark.parametrize("name", SHIPPED)
    def test_all_conversions_have_a_price(self, name: str) -> None:
        """Protects the cost model against a pair of formats without a price, in the specs of general processors."""
        shipped = load_target_spec(name)
        formats = ("uint8", "int8", "uint16", "float32") if name == "generic-int8-npu" else STORED_FORMATS
        for source in formats:
            for destination in formats:
                assert shipped.conversion_elements_per_cycle(source, destination) > 0


class TestDocumentation:
    def test_example_is_valid(self) -> None:
        """Protects the guide: its smallest spec is a valid one that TVM accepts."""
        text = GUIDE.read_text(encoding="utf-8")
        example = read_target_spec(text.split("```toml\n")[1].split("```")[0], "the example")
        assert example.tvm_target().attrs["mcpu"] == "cortex-a53"
        assert example.offered_precisions("softmax") == ("float32",)

    def test_every_field_is_explained(self) -> None:
        """Protects the reference against a field, operator or kernel family that was added without a word."""
        text = GUIDE.read_text(encoding="utf-8")
        tables = (TargetSpec, Target, Unit, Conversion, Memory, Rules, Forbidden)
        fields = {field.alias or name for table in tables for name, field in table.model_fields.items()}
        missing = [
            word for word in (*fields, *OPERATOR_KINDS, *instruction_set_names(), *SHIPPED) if f"`{word}`" not in text
        ]
        assert [word for word in missing if f"[{word}]" not in text] == []


class TestTvmTarget:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                target(mcpu="cortex-a76x", mtriple="aarch64-linux-gnu"),
                r"target\.mcpu: LLVM knows no CPU .*cortex-a76 or",
            ),
            (target(mcpu="cortex-a76", mtriple="x86_64-linux-gnu"), r"target\.mcpu: .* for x86_64-linux-gnu"),
            (target(mtriple="arch64-linux-gnu"), r"target\.mtriple: 'arch64-linux-gnu' .*did you mean aarch64"),
            (
                target(mtriple="aarch64-linux-gnu", mattr=["+neon", "+dotproduct"]),
                r"target\.mattr: LLVM knows no feature 'dotproduct'",
            ),
            ({"target": {"tag": "raspberry-pi/4b"}}, r"target\.tag: TVM knows no target .*raspberry-pi/4b-aarch64"),
            (
                {"target": {"kind": "cuda", "arch": "sm_87", "host": {"kind": "llvm", "mcpu": "x"}}},
                r"target\.host\.mcpu: LLVM knows no CPU 'x'",
            ),
            ({"target": {"kind": "cuda", "arch": "sm_87"}}, r"instruction_sets: arm_neon, portable does not fit"),
            (
                {"target": {"kind": "cuda", "arch": "sm_75"}, "instruction_sets": ["cuda_mma", "cuda"]},
                r"the kernels of cuda_mma need a GPU of sm_80 or later, the target is sm_75",
            ),
            ({"instruction_sets": ["cuda"]}, r"instruction_sets: cuda does not fit a target of kind llvm"),
            ({"instruction_sets": ["arm_dotprod"]}, r"instruction_sets: the kernels of arm_dotprod need asimddp"),
            ({"instruction_sets": ["avx2"]}, r"instruction_sets: the kernels of avx2 need avx2, fma"),
        ],
    )
    def test_names_that_llvm_would_ignore(self, changes: dict[str, Any], message: str) -> None:
        """Protects against TVM's silence: LLVM ignores unknown CPUs and features and crashes on triples."""
        with pytest.raises(TargetSpecError, match=message):
            spec(**changes).tvm_target()

    def test_options_reach_tvm(self) -> None:
        """Protects that every option of the table is TVM's own option; a tag's options can be overridden."""
        built = spec(target={"tag": "raspberry-pi/4b-aarch64", "num-cores": 2}).tvm_target()
        assert built.attrs["mcpu"] == "cortex-a72"
        assert int(built.attrs["num-cores"]) == 2

    def test_other_machines_are_not_this_one(self) -> None:
        """Protects against running foreign code: another architecture, system or feature is named as the problem."""
        other = "aarch64" if platform.machine() == "x86_64" else "x86_64"
        families = ["portable"]
        foreign = spec(target={"kind": "llvm", "mtriple": f"{other}-linux-gnu"}, instruction_sets=families)
        assert not foreign.is_host_compatible()
        assert f"compiled for {other}" in foreign.host_problems()[0]
        windows = spec(target={"kind": "llvm", "mtriple": "x86_64-pc-windows-msvc"}, instruction_sets=families)
        assert not windows.is_host_compatible()
        local = {"target": {"kind": "llvm"}, "instruction_sets": families}
        assert spec(**local).is_host_compatible()

    @on_linux
    def test_lacking_feature(self) -> None:
        """Protects against illegal instructions: a feature that the CPU lacks is named."""
        lacking = spec(
            target={"kind": "llvm"}, instruction_sets=["portable"], required_cpu_features=["no_such_feature"]
        )
        assert lacking.host_problems() == ("this CPU lacks no_such_feature",)

    @pytest.mark.parametrize(
        ("exists", "version", "problem"),
        [
            (False, "", "finds no CUDA device"),
            (True, "7.5", "compiled for sm_87, this machine's GPU is sm_75"),
            (True, "8.6", "compiled for sm_87, this machine's GPU is sm_86"),
            (True, "9.0", "compiled for sm_87, this machine's GPU is sm_90"),
            (True, "8.7", ""),
            (True, "8.9", ""),
        ],
    )
    def test_gpus(self, monkeypatch: pytest.MonkeyPatch, exists: bool, version: str, problem: str) -> None:
        """Protects against a GPU that cannot run the code: binaries run on later GPUs of one major version only."""
        device = SimpleNamespace(exist=exists, compute_version=version)
        monkeypatch.setattr(tvm, "cuda", lambda _index: device)
        gpu = spec(target={"kind": "cuda", "arch": "sm_87"}, instruction_sets=["cuda"])
        assert gpu.is_host_compatible() == (problem == "")
        assert problem in "".join(gpu.host_problems())


class TestVocabulary:
    def test_every_layer_has_a_kind_that_specs_know(self) -> None:
        """Protects that specs and layers speak of the same operators."""

        def kind(operator: Operator) -> str:
            return Layer("name", "function", operator, ()).operator_kind

        plain = [c for c in get_args(Operator) if c not in (Conv2D, Movement)]
        kinds = {kind(object.__new__(c)) for c in plain}  # the class alone decides their kind
        shape = (1, 8, 8, 4)
        kinds |= {kind(Conv2D(shape, 4, Window((3, 3)), groups)) for groups in (1, 2, 4)}
        functions = ("reshape", "permute_dims", "strided_slice", "take", "pad")
        kinds |= {kind(Movement(function, shape, shape)) for function in functions}
        assert kinds == set(OPERATOR_KINDS)

    @pytest.mark.parametrize(
        ("spelling", "feature"),
        [
            ("avx512vnni", "avx512_vnni"), ("AVX512-VNNI", "avx512_vnni"), ("avx512_vnni", "avx512_vnni"),
            ("avxvnni", "avx_vnni"), ("avx512bf16", "avx512_bf16"), ("amx-int8", "amx_int8"), ("sse4.1", "sse4_1"),
            ("neon", "asimd"), ("+dotprod", "asimddp"), ("i8mm", "i8mm"), ("bf16", "bf16"), ("lzcnt", "abm"),
        ],
    )  # fmt: skip
    def test_spellings(self, spelling: str, feature: str) -> None:
        """Protects that Linux's, LLVM's and the manuals' spellings mean one feature."""
        assert normalize_feature(spelling) == feature == normalize_feature(feature)

    def test_families_need_features_as_linux_spells_them(self) -> None:
        """Protects the table of kernel families against a spelling that no CPU would match."""
        for found in load_instruction_sets():
            assert {normalize_feature(feature) for feature in found.cpu_features} == found.cpu_features


class TestDetection:
    def test_features_of_unlike_cores(self, tmp_path: Path) -> None:
        """Protects big.LITTLE machines: only what all cores have may be compiled in."""
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(
            "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n\nprocessor\t: 1\nFeatures\t: fp asimd\n"
        )
        assert cpu_features(cpuinfo) == {"fp", "asimd"}
        cpuinfo.write_text("processor\t: 0\nisa\t: rv64imafdc\n")
        assert cpu_features(cpuinfo) == frozenset()
        with pytest.raises(TargetSpecError, match="read on Linux only"):
            cpu_features(tmp_path / "missing")

    def test_base_follows_flags(self) -> None:
        """Protects the choice of kernels: by what the flags say, the best set whose whole level is there."""

        def base_spec(machine: str, features: Set[str]) -> str:
            return best_host(machine, features)[1].name

        v3 = {"avx", "avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe"}
        v4 = v3 | {"avx512f", "avx512bw", "avx512vl", "avx512cd", "avx512dq"}
        assert base_spec("x86_64", v3) == "x86-64-avx2"
        assert base_spec("x86_64", v4) == "x86-64-avx2"
        assert base_spec("x86_64", v4 | {"avx512_vnni"}) == "x86-64-avx512-vnni"
        assert base_spec("x86_64", v4 | {"avx512_vnni", "avx512_bf16"}) == "x86-64-avx512-bf16"
        assert base_spec("x86_64", v3 | {"avx_vnni"}) == "x86-64-avx-vnni"
        assert base_spec("x86_64", {"sse4_2"}) == "portable-cpu"
        assert base_spec("aarch64", {"asimd"}) == "cortex-a72"
        assert base_spec("aarch64", {"asimd", "asimddp"}) == "cortex-a76"
        assert base_spec("riscv64", frozenset()) == "portable-cpu"

    def test_cache_sizes(self, tmp_path: Path) -> None:
        """Protects the reading of Linux's cache files: no instruction caches, megabytes understood, gaps allowed."""
        entries = (("1", "Data", "48K"), ("1", "Instruction", "64K"), ("2", "Unified", "2M"))
        for index, (level, kind, size) in enumerate(entries):
            folder = tmp_path / f"index{index}"
            folder.mkdir()
            for name, text in (("level", level), ("type", kind), ("size", size)):
                (folder / name).write_text(text + "\n")
        assert cache_sizes_kib(tmp_path) == {"l1_data_kib": 48, "l2_kib": 2048}
        assert cache_sizes_kib(tmp_path / "none") == {}

    @on_linux
    def test_this_machine(self) -> None:
        """Protects detection: this CPU's flags decide, the result runs here and has the same hash each time."""
        host = detect_host()
        flags = set(Path("/proc/cpuinfo").read_text().split())
        vnni = flags >= {"avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}
        expected = {
            "avx512_bf16": vnni and "avx512_bf16" in flags,
            "avx512_vnni": vnni,
            "avx_vnni": "avx_vnni" in flags and not vnni,
            "avx2": flags >= {"avx2", "fma", "f16c", "bmi2"},
            "arm_dotprod": "asimddp" in flags,
            "arm_neon": "asimd" in flags,
            "portable": True,
        }
        assert {name for name, has in expected.items() if has} == set(host.instruction_sets) - {"reference"}
        assert host.name == "host"
        assert host.is_host_compatible()
        assert 1 <= host.units[0].count <= len(os.sched_getaffinity(0))
        assert 0.2 < host.memory.bandwidth_gb_per_s < 5000
        assert load_target_spec("host").spec_hash() == host.spec_hash()


class TestCommandLine:
    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(targets_app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    def test_list(self) -> None:
        """Protects 'hquant targets list': every shipped spec on one plain line of its own."""
        lines = self.run("list").splitlines()
        assert [line.split()[0] for line in lines[1:]] == list(SHIPPED)

    def test_show(self) -> None:
        """Protects 'hquant targets show': rates, reasons and hash, uncut where no terminal is."""
        text = self.run("show", "generic-int8-npu")
        npu = load_target_spec("generic-int8-npu")
        assert npu.spec_hash() in text
        assert "a16w16 256" in text
        assert npu.rules.forbidden[0].reason in text
        assert "\x1b" not in text

    @on_linux
    def test_detect_check_and_use(self, tmp_path: Path) -> None:
        """Protects the guide's path: detect writes a file that check accepts and load reads."""
        path = tmp_path / "mine.toml"
        assert str(path) in self.run("detect", "-o", str(path))
        assert path.read_text().startswith("# Detected")
        assert f"{path}: valid" in self.run("check", str(path))
        assert load_target_spec(path).spec_hash() == detect_host().spec_hash()
        with pytest.raises(TargetSpecError, match="cannot write"):
            self.run("detect", "-o", str(tmp_path / "no" / "folder.toml"))

    def test_check_finds_what_reading_cannot(self, tmp_path: Path) -> None:
        """Protects 'hquant targets check': LLVM's names are checked, idle units and a missing compiler are told."""
        path = tmp_path / "board.toml"
        path.write_text(spec(target={"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "corte"}).to_toml())
        with pytest.raises(TargetSpecError, match=r"board\.toml: .*mcpu"):
            self.run("check", str(path))
        rules = {"forbidden": [{"precision": "*float32", "reason": "none"}, {"precision": "w8", "reason": "none"}]}
        compilers = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "cross_compiler": "no-such-compiler"}
        path.write_text(spec(rules=rules, target=compilers).to_toml())
        text = self.run("check", str(path))
        assert "no work to the units floats" in text
        assert "no-such-compiler is not on this machine's PATH" in text
