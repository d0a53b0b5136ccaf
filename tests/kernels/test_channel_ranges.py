"""Kernels that read channels where they lie in wider buffers, and store outputs in turns with another tensor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.kernels import anchor_cases as anchors
from tests.kernels.anchor_cases import in_buffers
from tests.kernels.kernel_cases import additions, assert_matches_contract, code_unaries, concats, conversions, products
from tvm_hquant import numerics
from tvm_hquant.kernels.interface import Interleaving, KernelRequest, Placement
from tvm_hquant.kernels.kernel_function import input_shapes
from tvm_hquant.kernels.reference.family import ReferenceFamily
from tvm_hquant.kernels.registry import ANCHOR_FAMILIES, families_for_target
from tvm_hquant.kernels.weightless.family import CommonFamily
from tvm_hquant.operators import Add, Conv2D, Epilogue, MaxPool2D, Multiply, Window
from tvm_hquant.stored_outputs import in_channel_order, in_wider_buffers

_WEIGHTS = {"uint8": "int8", "uint16": "int8", "float32": "float32", "bfloat16": "bfloat16"}


@st.composite
def placements(draw: st.DrawFn, channels: int) -> Placement | None:
    """Channels in a buffer with others around them, or in one of their own."""
    before, behind = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    return Placement(before, before + channels + behind) if before + behind else None


@pytest.mark.parametrize("family", anchors.FAMILIES)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ranges_of_channels_are_exact(family: str, data: st.DataObject) -> None:
    """Odd numbers of channels, groups, windows with padding, dilated, over the ends of rows: the contract's values.

    What lies beside the channels in a buffer, or beside those of a residual, is random, and stays as it is where outputs are
    placed; the other tensor is stored as it is.
    """
    groups, window = data.draw(st.sampled_from([1, 1, 1, 2])), data.draw(st.sampled_from(_WINDOWS))
    inputs, outputs = (groups * data.draw(st.integers(1, 70)) for _ in range(2))
    shape = (data.draw(st.integers(1, 2)), *data.draw(st.tuples(st.integers(4, 7), st.integers(4, 7))), inputs)
    storage, has_residual = data.draw(st.sampled_from(list(_WEIGHTS))), data.draw(st.booleans())
    ends = Epilogue(True, has_residual, data.draw(st.sampled_from([0.0, -np.inf])))
    operator = Conv2D(shape, outputs, window, groups, ends)
    source, residual, other = (data.draw(placements(channels)) for channels in (inputs, outputs, outputs))
    sources = (source, residual)[: 1 + has_residual]
    position = data.draw(st.sampled_from([0, 1, None]))
    request = KernelRequest(
        operator,
        (storage,) * (1 + has_residual),
        storage,
        _WEIGHTS[storage],
        sources=sources if any(sources) else (),
        placement=other if position is None else None,
        interleaved=Interleaving(position, other) if position is not None else None,
        finite_weights=storage in ("float32", "bfloat16"),
    )
    # Patches of few channels and sweeps over a map do not reach them.
    assume(ANCHOR_FAMILIES[family].kernel(request) is not None)
    anchors.check(family, request, data.draw(st.integers(0, 99)), data.draw(st.sampled_from([127, 63, 7])))


_WINDOWS = [
    Window((1, 1)),
    Window((1, 1), (2, 2)),
    Window((3, 3), (1, 1), (1, 1, 1, 1)),
    Window((2, 3), (2, 1), (0, 1, 1, 1), (1, 2)),
]


@pytest.mark.parametrize("family", anchors.AT_HAND)
@pytest.mark.parametrize("storage", list(_WEIGHTS))
def test_depthwise_layers_read_ranges_of_channels(family: str, storage: str) -> None:
    """With words of several rows, lane by lane, without padding and with it; as a scaling of single pixels."""
    for channels, window in ((37, Window((3, 3), (2, 2), (1, 1, 1, 1))), (67, Window((1, 1)))):
        operator = Conv2D((1, 7, 6, channels), channels, window, channels)
        sources = (Placement(5, channels + 9),)
        anchors.check(family, KernelRequest(operator, (storage,), storage, _WEIGHTS[storage], sources=sources))


@pytest.mark.parametrize(("family", "storage", "size"), [("avx2", "uint8", 14), ("avx2", "float32", 7)])
def test_other_algorithms_read_ranges_of_channels(family: str, storage: str, size: int) -> None:
    """Winograd's, with padding and without, and sweeps over a map."""
    if family not in anchors.HOST:
        pytest.skip(f"this CPU has no {family}")
    names = []
    for padding in ((1, 1, 1, 1), (0, 0, 0, 0)):
        operator = Conv2D((1, size, size, 64), 64, Window((3, 3), padding=padding), 1, Epilogue(True, lower=0.0))
        request = KernelRequest(operator, (storage,), storage, _WEIGHTS[storage], sources=(Placement(3, 70),))
        names.append(anchors.check(family, request).name)
    if storage == "uint8":
        assert all("winograd" in name for name in names)
    else:
        assert "sweeps" in names[0]


@pytest.mark.parametrize("instruction_set", anchors.FAMILIES)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_layers_without_weights_read_ranges_of_channels(instruction_set: str, data: st.DataObject) -> None:
    """Any elementwise layer and concatenation of channels, with one input or both in wider buffers: the contract's bits."""
    case = data.draw(st.one_of(additions(), conversions(), code_unaries(), products(), concats()))
    shapes = input_shapes(case.request.operator)
    sources = tuple(data.draw(placements(shape[-1])) for shape in shapes)
    assume(any(sources))
    wide = replace(case, request=replace(case.request, sources=sources))
    family = next(f for f in families_for_target((instruction_set,)) if isinstance(f, CommonFamily))
    kernel = family.kernel(wide.request)
    assume(kernel is not None)
    assert_matches_contract(kernel, wide, anchors.TARGETS[instruction_set])


@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_plain_loops_reach_other_buffers(storage: str) -> None:
    """Reference kernels, which C source is made of, read a residual beside it all."""
    operator = Conv2D((1, 3, 4, 6), 9, Window((3, 3), padding=(1, 1, 1, 1)), 3, Epilogue(True, True))
    request = KernelRequest(
        operator,
        (storage, storage),
        storage,
        _WEIGHTS[storage],
        sources=(Placement(2, 11), None),
        interleaved=Interleaving(0, Placement(1, 12)),
    )
    rng = np.random.default_rng(0)
    request, constants, values = anchors.random_case(rng, request)
    kernel = ReferenceFamily().kernel(request)
    assert kernel is not None
    buffers = in_buffers(rng, request, values)
    stored = anchors.run_kernel(kernel, constants, buffers, anchors.TARGETS["portable"])
    np.testing.assert_array_equal(in_channel_order(request, stored), numerics.evaluate(request, constants, values))
    np.testing.assert_array_equal(stored[..., 1::2], buffers[2][..., 1:10])


def test_what_no_kernel_reaches() -> None:
    """Depthwise layers do not store in turns; patches of a first layer, pools and GPUs have buffers of their own."""
    family, other = ANCHOR_FAMILIES["avx2"], Interleaving(1)
    conv = Conv2D((1, 4, 4, 8), 16, Window((1, 1)))
    plain = KernelRequest(conv, ("uint8",), "uint8", "int8", interleaved=other)
    assert family.kernel(plain) is not None
    depthwise = Conv2D((1, 4, 4, 32), 32, Window((3, 3)), 32)
    assert family.kernel(KernelRequest(depthwise, ("uint8",), "uint8", "int8", interleaved=other)) is None
    stem = Conv2D((1, 13, 13, 3), 32, Window((3, 3), (2, 2)))
    patches = KernelRequest(stem, ("uint8",), "uint8", "int8", sources=(Placement(0, 6),))
    assert ANCHOR_FAMILIES["avx512_vnni"].kernel(patches) is None
    add = KernelRequest(Add((1, 4, 4, 7)), ("uint8", "uint8"), "uint8", sources=(Placement(0, 9), None))
    assert CommonFamily(4).kernel(add) is not None
    assert CommonFamily(8).kernel(add) is None
    pool = KernelRequest(MaxPool2D((1, 4, 4, 8), Window((2, 2))), ("uint8",), "uint8", sources=(Placement(0, 9),))
    assert CommonFamily(8).kernel(pool) is None
    scale = KernelRequest(
        Multiply(((1, 4, 4, 8), (1, 1, 1, 1))), ("float32",) * 2, "float32", sources=(Placement(1, 9), None)
    )
    assert CommonFamily(8).kernel(scale) is None
    assert ReferenceFamily("cuda").kernel(plain) is None


def test_buffers_around_inputs() -> None:
    """The check of a kernel with given inputs puts them where it reads them, and zeros elsewhere."""
    conv = Conv2D((1, 1, 1, 2), 3, Window((1, 1)))
    request = KernelRequest(
        conv, ("uint8",), "uint8", "int8", sources=(Placement(1, 4),), interleaved=Interleaving(0, Placement(0, 5))
    )
    source, other = in_wider_buffers(request, [np.array([[[[7, 8]]]], np.uint8)])
    assert source.ravel().tolist() == [0, 7, 8, 0]
    assert other.ravel().tolist() == [0] * 5
    assert in_channel_order(request, np.arange(6, dtype=np.uint8)).tolist() == [0, 2, 4]
