"""When two specs are one: hashes, and the text that is written and read back."""

from __future__ import annotations

import pickle
import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.target_spec.spec_content import content, spec
from tvm_hquant.target_spec import list_target_specs, load_target_spec, read_target_spec
from tvm_hquant.target_spec.load import spec_from
from tvm_hquant.target_spec.toml_text import toml_text

SHIPPED = list_target_specs()


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip(name: str) -> None:
    """Protects that a written spec is the same spec, and that a spec travels to other processes."""
    shipped = load_target_spec(name)
    again = read_target_spec(shipped.to_toml(), "again")
    assert again == shipped
    assert again.spec_hash() == shipped.spec_hash()
    assert pickle.loads(pickle.dumps(shipped)) == shipped
    assert len({shipped, again}) == 1


def test_hash_follows_what_decides_plans() -> None:
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


def test_specs_do_not_change() -> None:
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
def test_written_toml_is_read_back(value: Any, table: dict[str, int]) -> None:
    """Protects the writer over all of TOML's text, keys and numbers: what is written is what is read."""
    try:
        for text in (str(value), *table):
            text.encode()
    except UnicodeEncodeError:
        return
    document = {"value": value, "table": table, "tables": [{"inner": table}, {"x": value}]}
    assert tomllib.loads(toml_text(document)) == document
