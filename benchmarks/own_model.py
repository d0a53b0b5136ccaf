"""An ONNX file of your own that engines are to be compared on, with data to calibrate them with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter

from tests.onnx_models import random_inputs
from tvm_hquant.calibration.data import open_data
from tvm_hquant.frontend.onnx_file import model_inputs
from tvm_hquant.frontend.onnx_shapes import fixed_input_shapes, with_fixed_inputs

_SAMPLES = 16
"""Of calibration data. What scales are makes no engine faster, and ONNX Runtime's tool keeps all tensors of all samples."""

_OPERATOR_SET = 13
"""The first that has scales per channel, which the tools of the other engines write."""


@dataclass(frozen=True)
class OwnModel:
    """Where it is.

    Attributes:
        path: the ONNX file.
        calibration: a ``.npz`` or ``.npy`` file or a folder of such, as ``hquant compile --calibration`` takes it; None: one
            sample of normally distributed values.
        input_shapes: for dimensions that the file leaves open, but the first, which becomes 1.
    """

    path: Path
    calibration: Path | None = None
    input_shapes: Mapping[str, Sequence[int]] | None = None

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def changed(self) -> float:
        """When the model or its data was written last, in seconds since the epoch."""
        return max(p.stat().st_mtime for p in (self.path, self.calibration) if p is not None)

    def read(self) -> tuple[Any, dict[str, npt.NDArray[Any]]]:
        """The model with inputs of fixed shapes, and samples for it: an array for each input, samples along the first axis.

        Raises:
            ModelError: a dimension is open.
            DataError: the data does not fit the model.
        """
        model = onnx.load(self.path)
        with_fixed_inputs(model, fixed_input_shapes(model, str(self.path), self.input_shapes, 1))
        if any(opset.domain == "" and opset.version < _OPERATOR_SET for opset in model.opset_import):
            model = onnx.version_converter.convert_version(model, _OPERATOR_SET)
        if self.calibration is None:
            return model, random_inputs(model)
        samples = list(islice(open_data(self.calibration, _signature(model)), _SAMPLES))
        return model, {name: np.concatenate([s.inputs[name] for s in samples]) for name in samples[0].inputs}


def _signature(model: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    found = {}
    for value in model_inputs(model.graph):
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        found[value.name] = (tuple(d.dim_value for d in tensor.shape.dim), str(dtype))
    return found
