"""What is asked of a spec: precisions, rates, reasons, features."""

from __future__ import annotations

import pytest

from tests.target_spec.spec_content import content, spec, unit
from tvm_hquant.errors import PrecisionError, TargetSpecError
from tvm_hquant.target_spec import load_target_spec


def test_preference_is_the_order_of_the_file() -> None:
    """Protects the documented order: units as listed, precisions as listed, the first mention counts."""
    assert spec().offered_precisions("conv2d") == ("a8w8", "int8", "a8w4", "a16w8", "float32", "w8")
    reordered = spec(units=list(reversed(content()["units"])))
    assert reordered.offered_precisions("conv2d") == ("float32", "w8", "a8w8", "int8", "a8w4", "a16w8")


def test_operators_without_weights() -> None:
    """Protects that weight bits mean nothing to an addition: one name per format, every equal name accepted."""
    board = spec()
    assert board.offered_precisions("add") == ("a8w8", "int8", "a16w8", "float32")
    for name in ("a8w8", "a8w2", "a16w16", "w3", "uint8"):
        assert board.reason_against(name, "add") is None
    assert board.macs_per_cycle("a8w2", "add") == board.macs_per_cycle("a8w4", "add") == 10


def test_no_unit() -> None:
    """Protects the reason shown where hardware lacks something."""
    assert spec().reason_against("float16", "conv2d") == "no unit of board computes conv2d in float16"
    assert spec().reason_against("a8w8", "softmax") == "no unit of board computes softmax in a8w8"
    assert spec().rule_against("a8w8", "softmax") is None, "what no unit lists is no rule"
    assert spec().offered_precisions("softmax") == ("float32",)


def test_forbidden_shows_its_reason() -> None:
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


def test_keep_float() -> None:
    """Protects rules.keep_float: operator kinds and layer names, other layers untouched."""
    board = spec(rules={"keep_float": ["dense", "head/*"]})
    assert board.offered_precisions("dense") == ("float32",)
    assert board.offered_precisions("conv2d", "head/conv") == ("float32",)
    assert board.offered_precisions("conv2d", "stem/conv") == spec().offered_precisions("conv2d")
    assert "keeps head/* in float" in str(board.reason_against("w8", "conv2d", "head/conv"))
    assert board.keeps_float("dense")
    assert not board.keeps_float("conv2d", "stem/head/conv")


def test_times_of_what_stands_for_other_hardware_are_not_its() -> None:
    """Reference kernels and C source run on this machine, for an accelerator and for microcontrollers."""
    assert load_target_spec("host").is_timed_here()
    for name in ("generic-int8-npu", "c-source"):
        stands_for_others = load_target_spec(name)
        assert stands_for_others.is_host_compatible()
        assert not stands_for_others.is_timed_here()


def test_symmetric_only() -> None:
    """Protects hardware without zero points: of the integer precisions int8 alone is left."""
    board = spec(rules={"symmetric_activations_only": True})
    assert board.offered_precisions("conv2d") == ("int8", "float32", "w8")
    assert "symmetric" in str(board.reason_against("a16w8", "conv2d"))
    assert board.rule_against("a16w8", "conv2d") == board.reason_against("a16w8", "conv2d")


def test_fastest_unit_counts() -> None:
    """Protects cost predictions: where two units offer a precision, the faster one's rate, clock and count hold."""
    slow = unit("slow", ["*"], {"a8w8": 100}, clock_ghz=0.1)
    fast = unit("fast", ["*"], {"a8w8": 8}, clock_ghz=2.0, count=4)
    board = spec(units=[slow, fast, unit("floats", ["*"], {"float32": 1})])
    assert board.unit_for("a8w8", "dense").name == "fast"
    assert board.macs_per_cycle("a8w8", "dense") == 8
    assert board.macs_per_second("a8w8", "dense") == pytest.approx(8 * 2e9 * 4)
    assert board.macs_per_second("a8w8", "dense", cores=1) == pytest.approx(8 * 2e9)


def test_conversions_first_entry_counts() -> None:
    """Protects the documented precedence of conversions."""
    entries = [
        {"from": "float32", "to": "*int*", "elements_per_cycle": 1},
        {"from": "*", "to": "*", "elements_per_cycle": 2},
    ]
    board = spec(conversions=entries)
    assert board.conversion_elements_per_cycle("float32", "uint16") == 1
    assert board.conversion_elements_per_cycle("uint8", "float32") == 2


def test_unknown_words_are_errors() -> None:
    """Protects against a typing mistake in a query that would read as 'not offered'."""
    with pytest.raises(TargetSpecError, match="unknown operator 'conv3d'"):
        spec().offered_precisions("conv3d")
    with pytest.raises(PrecisionError, match="unknown precision"):
        spec().reason_against("int9", "conv2d")


def test_narrow_widths_run_in_the_kernels_of_wider_ones() -> None:
    """What a unit says of a8w6 holds for a6w6, and where it is forbidden so is this."""
    board = load_target_spec("x86-64-avx2")
    for narrow, wide in (
        ("a6w6", "a8w6"),
        ("a4w4", "a8w4"),
        ("a12w5", "a16w8"),
        ("a6w4x2", "a8w4x2"),
        ("a6w12", "a8w6x2"),
        ("a12w12", "a16w8x2"),
    ):
        assert board.reason_against(narrow, "conv2d") is None
        assert board.macs_per_cycle(narrow, "conv2d") == board.macs_per_cycle(wide, "conv2d")
    symmetric = spec(rules={"symmetric_activations_only": True})
    assert "symmetric" in str(symmetric.reason_against("a6w6", "conv2d"))


def test_features_needed_come_from_everywhere() -> None:
    """Protects loading: features of the spec, the units and the kernel families are all checked."""
    board = spec(
        required_cpu_features=["AES"],
        units=[*content()["units"], unit("m", ["*"], {"int8": 64}, required_features=["i8mm"])],
    )
    assert board.cpu_features_needed() == {"aes", "i8mm", "asimd"}
    assert board.missing_features({"neon", "i8mm"}) == {"aes"}
