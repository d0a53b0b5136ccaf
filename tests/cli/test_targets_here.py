"""Targets that this machine can run beside its own: protects simulation and compilation for less than the CPU has."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import tvm_hquant as hq
from tvm_hquant import quickstart


def outputs_on(spec: hq.TargetSpec) -> npt.NDArray[Any]:
    """Logits of the quickstart network in a8w8, calibrated, compiled and run for a target."""
    with np.load(quickstart.calibration_path()) as arrays:
        images = arrays["input"][:12]
    result = hq.quantize(str(quickstart.model_path()), spec, {"input": images}, precision="a8w8", baselines=False)
    return hq.compile(result).run(images)["logits"]


@pytest.fixture(scope="module")
def outputs_on_the_host() -> npt.NDArray[Any]:
    return outputs_on(hq.detect_host())


@pytest.mark.parametrize("target", ["generic-int8-npu", "portable-cpu"])
def test_same_bits_as_on_the_host(target: str, outputs_on_the_host: npt.NDArray[Any]) -> None:
    """The simulation uses the best that this CPU has, whatever the target: LLVM once ended the process over that."""
    spec = hq.load_target_spec(target)
    if not spec.is_host_compatible():
        pytest.skip("; ".join(spec.host_problems()))
    np.testing.assert_array_equal(outputs_on(spec), outputs_on_the_host)
