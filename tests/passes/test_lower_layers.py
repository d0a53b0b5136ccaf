"""Lowering swaps kernels and packs constants: protects that the values stay the same to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.planned_models import (
    PRECISIONS,
    built_outputs,
    host_spec,
    one_sample,
    shared_session,
    simulated,
    stages,
)
from tvm_hquant.errors import KernelError
from tvm_hquant.kernels.interface import IntegerAnchorConstants, Kernel, KernelRequest
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.kernels.registry import families_for_target, select_kernel
from tvm_hquant.layers import read_layers
from tvm_hquant.operator_codec import decode
from tvm_hquant.operators import Conv2D
from tvm_hquant.passes.lower_layers import lower_layers
from tvm_hquant.relax_ir.kernel_calls import KERNEL_ATTRIBUTE, REQUEST_ATTRIBUTE, call_constants, read_realized

CASES = [("residual", p) for p in (*PRECISIONS, "mixed")] + [("branches", "mixed")]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_lowered_module_equals_the_simulator_bit_for_bit(model: str, name: str) -> None:
    """What was searched with is what is deployed: the same kernels behind TVM's memory planner and virtual machine."""
    session = shared_session(model)
    outputs = built_outputs(stages(model, name)["lower_layers"], *one_sample(session).values())
    for lowered, expected in zip(outputs, simulated(model, name), strict=True):
        np.testing.assert_array_equal(lowered, expected)


@pytest.mark.parametrize("families", [("portable",), ("reference",)])
def test_every_family_gives_the_same_bits(families: tuple[str, ...]) -> None:
    """A plan that was searched on this machine means the same on a target with other instructions."""
    session = shared_session("residual")
    realized = stages("residual", "mixed")["realize_quantization"]
    lowered = lower_layers(families_for_target(families))(realized)
    outputs = built_outputs(lowered, *one_sample(session).values())
    np.testing.assert_array_equal(outputs[0], simulated("residual", "mixed")[0])


def test_each_layer_gets_the_kernel_of_the_first_family_that_has_one() -> None:
    """The attribute that reports show is the kernel that is called, and its constants are packed for it."""
    families = families_for_target(host_spec().instruction_sets)
    realized, lowered = (stages("residual", "a8w8")[stage] for stage in ("realize_quantization", "lower_layers"))
    checked = 0
    for layer in read_layers(lowered).layers:
        found = read_realized(realized[layer.function_name])
        assert found is not None
        request, constants = found
        function = lowered[layer.function_name]
        if KERNEL_ATTRIBUTE not in function.attrs:
            continue
        kernel = select_kernel(families, request)
        assert function.attrs[KERNEL_ATTRIBUTE] == kernel.name
        for ours, theirs in zip(call_constants(function), kernel.pack(constants), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        checked += isinstance(constants, IntegerAnchorConstants)
    assert checked == 3


def test_requests_attributes_and_calls_stay() -> None:
    """Only kernels, packed constants and places of outputs change: the lowered module says, too, what a layer computes."""
    realized, lowered = (stages("branches", "mixed")[stage] for stage in ("realize_quantization", "lower_layers"))
    before, after = read_layers(realized), read_layers(lowered)
    assert [(a.name, a.operator, a.inputs) for a in before.layers] == [
        (b.name, b.operator, b.inputs) for b in after.layers
    ]
    for layer in before.layers:
        own, original = (dict(mod[layer.function_name].attrs) for mod in (lowered, realized))
        if REQUEST_ATTRIBUTE in own:
            request, wanted = (decode(str(a.pop(REQUEST_ATTRIBUTE))) for a in (own, original))
            assert replace(request, overwritten=None) == wanted
        assert {**own, KERNEL_ATTRIBUTE: None} == {**original, KERNEL_ATTRIBUTE: None}


class NoConvolutions:
    """Kernels for everything but convolutions."""

    name = "none"

    def kernel(self, request: KernelRequest) -> Kernel | None:
        return None if isinstance(request.operator, Conv2D) else ReferenceFamily().kernel(request)


def test_missing_kernel_is_named() -> None:
    """Which operator from which storages no family computes."""
    with pytest.raises(KernelError, match=r"no kernel family of none computes Conv2D from uint8"):
        lower_layers((NoConvolutions(),))(stages("residual", "a8w8")["realize_quantization"])


def test_reshape_needs_no_kernel() -> None:
    """A view stays Relax's own reshape, which the runtime does without copying."""
    lowered = stages("residual", "a8w8")["lower_layers"]
    function = lowered["reshape_0"]
    assert function.body.blocks[0].bindings[0].value.op.name == "relax.reshape"
    assert KERNEL_ATTRIBUTE not in function.attrs
    assert REQUEST_ATTRIBUTE in function.attrs
