"""The specs that ship with the package, and the guide that explains their fields."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from tvm_hquant.errors import PrecisionError
from tvm_hquant.kernels.instruction_set import load_instruction_set
from tvm_hquant.layers import Layer
from tvm_hquant.operators import Conv2D, GroupNormalization, Movement, Operator, Window
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
    list_target_specs,
    load_target_spec,
    normalize_feature,
    read_target_spec,
)

SHIPPED = list_target_specs()
GUIDE = Path(__file__).parents[2] / "docs" / "target-spec.md"


def test_all_are_there() -> None:
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
def test_valid_and_known_to_tvm(name: str) -> None:
    """Protects every shipped spec: its name is its file's, and TVM and LLVM know its target, CPU and features."""
    shipped = load_target_spec(name)
    assert shipped.name == name
    kinds = {"jetson-orin": "cuda", "cuda-sm75": "cuda", "cuda-sm80": "cuda", "cuda-sm90": "cuda", "c-source": "c"}
    assert shipped.tvm_target().kind.name == kinds.get(name, "llvm")


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_unoffered_is_listed(name: str) -> None:
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
def test_processors_offer_everything(name: str) -> None:
    """Protects that general processors offer all realized precisions to layers with weights; C99 has no float16."""
    expected = set(REALIZED) - ({"float16"} if name == "c-source" else set())
    for kind in OPERATORS_WITH_WEIGHTS:
        assert set(load_target_spec(name).offered_precisions(kind)) == expected


@pytest.mark.parametrize("name", SHIPPED)
def test_codes_flow_through_operators_without_weights(name: str) -> None:
    """Protects networks from refusals and conversions: what has a kernel for 8-bit codes is offered by every spec."""
    shipped = load_target_spec(name)
    in_floats = {
        "bias_add",
        "softmax",
        "local_response_normalization",
        "layer_normalization",
        "group_normalization",
        "opaque",
    }
    refused = [kind for kind in OPERATOR_KINDS if kind not in in_floats and shipped.reason_against("a8w8", kind)]
    assert refused == []


def test_npu_offers_no_float() -> None:
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


def test_two_passes_cost_twice() -> None:
    """Protects the cost of 16 bits on int8 units, which the arithmetic fixes: two and four passes, none faster than 8 bits."""
    for name in SHIPPED:
        shipped = load_target_spec(name)
        for kind in OPERATORS_WITH_WEIGHTS:
            base = shipped.macs_per_cycle("a8w8", kind)
            two_passes = shipped.macs_per_cycle("a16w8", kind)
            assert base * 0.35 < two_passes <= base / 2
            assert shipped.macs_per_cycle("a16w16", kind) == two_passes / 2


@pytest.mark.parametrize("name", SHIPPED)
def test_all_conversions_have_a_price(name: str) -> None:
    """Protects the cost model against a pair of formats without a price, in the specs of general processors."""
    shipped = load_target_spec(name)
    formats = ("uint8", "int8", "uint16", "float32") if name == "generic-int8-npu" else STORED_FORMATS
    for source in formats:
        for destination in formats:
            assert shipped.conversion_elements_per_cycle(source, destination) > 0


def test_example_is_valid() -> None:
    """Protects the guide: its smallest spec is a valid one that TVM accepts."""
    text = GUIDE.read_text(encoding="utf-8")
    example = read_target_spec(text.split("```toml\n")[1].split("```")[0], "the example")
    assert example.tvm_target().attrs["mcpu"] == "cortex-a53"
    assert example.offered_precisions("softmax") == ("float32",)


def test_every_field_is_explained() -> None:
    """Protects the reference against a field or operator that was added without a word."""
    text = GUIDE.read_text(encoding="utf-8")
    tables = (TargetSpec, Target, Unit, Conversion, Memory, Rules, Forbidden)
    fields = {field.alias or name for table in tables for name, field in table.model_fields.items()}
    missing = [word for word in (*fields, *OPERATOR_KINDS) if f"`{word}`" not in text]
    assert [word for word in missing if f"[{word}]" not in text] == []


def test_every_layer_has_a_kind_that_specs_know() -> None:
    """Protects that specs and layers speak of the same operators."""

    def kind(operator: Operator) -> str:
        return Layer("name", "function", operator, ()).operator_kind

    plain = [c for c in get_args(Operator) if c not in (Conv2D, Movement, GroupNormalization)]
    kinds = {kind(object.__new__(c)) for c in plain}  # the class alone decides their kind
    shape = (1, 8, 8, 4)
    kinds |= {kind(Conv2D(shape, 4, Window((3, 3)), groups)) for groups in (1, 2, 4)}
    kinds |= {kind(GroupNormalization(shape, axis, 3, 1e-5)) for axis in (1, 3)}
    functions = ("reshape", "permute_dims", "strided_slice", "take", "depth_to_space", "pad")
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
def test_spellings(spelling: str, feature: str) -> None:
    """Protects that Linux's, LLVM's and the manuals' spellings mean one feature."""
    assert normalize_feature(spelling) == feature == normalize_feature(feature)


@pytest.mark.parametrize("name", ["cuda-sm75", "cuda-sm80", "cuda-sm90", "jetson-orin"])
def test_a_rule_leaves_out_what_is_not_bit_exact(name: str) -> None:
    """Protects whoever needs every bit: one rule takes units and kernels together, and precisions keep a unit."""
    shipped = load_target_spec(name)
    assert not shipped.is_bit_exact("float16", "conv2d")
    assert shipped.is_bit_exact("a8w8", "conv2d")
    assert shipped.is_bit_exact("float16", "depthwise_conv2d")
    exact = read_target_spec(shipped.to_toml() + "\n[rules]\nbit_exact = true\n", "exact.toml")
    assert all(unit.bit_exact for unit in exact.units)
    assert all(load_instruction_set(found).is_bit_exact for found in exact.instruction_sets)
    assert exact.macs_per_cycle("float16", "conv2d") < shipped.macs_per_cycle("float16", "conv2d")
    assert exact.tvm_target().kind.name == "cuda"
    assert read_target_spec(exact.to_toml(), "again.toml") == exact
    assert exact.spec_hash() != shipped.spec_hash()
