"""From a model as the user has it to a partitioned module: import, canonical form, channels-last, layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import IRModule

from tvm_hquant.compilation import StageObserver
from tvm_hquant.frontend import import_onnx, import_relax
from tvm_hquant.passes.canonicalize import canonicalize
from tvm_hquant.passes.convert_layout import convert_layout
from tvm_hquant.passes.partition_layers import partition_layers


def preparation_passes() -> list[tuple[str, Any]]:
    """Stages 1 and 2 with their names, in order."""
    return [
        ("canonicalize", canonicalize()),
        ("convert_layout", convert_layout()),
        ("partition_layers", partition_layers()),
    ]


def prepare_module(
    model: Any,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    observe: StageObserver | None = None,
) -> IRModule:
    """The partitioned module of a model.

    Args:
        model: path of an ONNX file, an ``onnx.ModelProto``, or a Relax ``IRModule`` with a function ``main``.
        input_shapes: fixes dynamic dimensions of inputs by name; a dynamic batch becomes 1 without it.
        observe: called with the module after every stage.

    Raises:
        ModelError: the model cannot be read or imported.
    """
    if isinstance(model, IRModule):
        mod = import_relax(model)
    else:
        mod = import_onnx(Path(model) if isinstance(model, str) else model, input_shapes)
    for name, stage in [("import", None), *preparation_passes()]:
        mod = stage(mod) if stage is not None else mod
        if observe is not None:
            observe(name, mod)
    return mod


def preparation_pipeline() -> Any:
    """The same passes as one ``Sequential``, for modules that are imported already."""
    return tvm.transform.Sequential([stage for _, stage in preparation_passes()], name="hquant.prepare")
