"""Fixes the dimensions of a model's inputs that the file leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm_hquant.errors import ModelError
from tvm_hquant.frontend.onnx_file import model_inputs


def fixed_input_shapes(
    model: Any, label: str, input_shapes: Mapping[str, Sequence[int]] | None, batch: int
) -> dict[str, tuple[int, ...]]:
    """A static shape for every input.

    The first dimension is ``batch`` where the file leaves it open. Dimensions of one symbolic name have one size.

    Raises:
        ModelError: a dimension stays open, or what is asked for contradicts the file.
    """
    if batch < 1:
        raise ModelError(f"batch is {batch}: it must be at least 1")
    inputs = model_inputs(model.graph)
    given = dict(input_shapes or {})
    unknown = [name for name in given if name not in {i.name for i in inputs}]
    if unknown:
        names = ", ".join(i.name for i in inputs)
        raise ModelError(f"input_shapes names {unknown[0]}, but {label} has the inputs {names}")
    sizes: dict[str, int] = {}
    for value in inputs:
        if value.name in given:
            _take_given(value, given[value.name], label, sizes)
    for value in inputs:
        if value.name not in given:
            _take_batch(value, label, sizes, batch)
    return {i.name: _resolved(i, given.get(i.name), label, sizes, batch) for i in inputs}


def with_fixed_inputs(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Writes shapes into a model proto of our own and drops initializers from its inputs, and shapes found before."""
    graph = model.graph
    inputs = model_inputs(graph)
    for value in inputs:
        del value.type.tensor_type.shape.dim[:]
        for size in shapes[value.name]:
            value.type.tensor_type.shape.dim.add().dim_value = size
    kept = [i.SerializeToString() for i in inputs]
    del graph.input[:]
    for text in kept:
        graph.input.add().ParseFromString(text)
    del graph.value_info[:]


def _dimensions(value: Any) -> list[int | str] | None:
    """Sizes, and for open dimensions their name ("" where they have none). None where even the rank is open."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.dim_value > 0 else str(d.dim_param) for d in tensor.shape.dim]


def _take_given(value: Any, shape: Sequence[int], label: str, sizes: dict[str, int]) -> None:
    written = "×".join(str(s) for s in shape)
    if not all(isinstance(s, int) and s > 0 for s in shape):
        raise ModelError(
            f"input_shapes gives input {value.name} the shape {written}: all sizes must be positive integers"
        )
    dimensions = _dimensions(value)
    if dimensions is None:
        return
    if len(dimensions) != len(shape):
        raise ModelError(
            f"input_shapes gives input {value.name} {len(shape)} dimensions ({written}), but in {label} it has "
            f"{len(dimensions)}"
        )
    for axis, (found, size) in enumerate(zip(dimensions, shape, strict=True)):
        if isinstance(found, int):
            if found != size:
                raise ModelError(
                    f"input_shapes gives dimension {axis} of input {value.name} the size {size}, but {label} fixes it to "
                    f"{found}: leave it at that, or export the model with an open dimension"
                )
        elif found and sizes.setdefault(found, size) != size:
            raise ModelError(
                f"input_shapes gives the dimension {found} of {label} two sizes, {sizes[found]} and {size}"
            )


def _take_batch(value: Any, label: str, sizes: dict[str, int], batch: int) -> None:
    dimensions = _dimensions(value)
    if not dimensions:
        return
    first = dimensions[0]
    if isinstance(first, str):
        if first:
            sizes.setdefault(first, batch)
    elif batch not in (1, first):
        raise ModelError(
            f"batch is {batch}, but {label} fixes the first dimension of input {value.name} to {first}: "
            "export the model with an open batch dimension"
        )


def _resolved(
    value: Any, given: Sequence[int] | None, label: str, sizes: Mapping[str, int], batch: int
) -> tuple[int, ...]:
    if given is not None:
        return tuple(int(s) for s in given)
    dimensions = _dimensions(value)
    template = "…" if dimensions is None else ",".join(str(d or "?") for d in dimensions)
    hint = (
        f'say its shape with --input-shapes "{value.name}:[{template}]", all sizes as numbers (in Python input_shapes={{'
        f'"{value.name}": (…)}})'
    )
    if dimensions is None:
        raise ModelError(f"{label} does not say how many dimensions input {value.name} has: {hint}")
    result: list[int] = []
    for axis, found in enumerate(dimensions):
        if isinstance(found, int):
            result.append(found)
        elif found in sizes:
            result.append(sizes[found])
        elif axis == 0:
            result.append(batch)
        else:
            raise ModelError(f'dimension {axis} ("{found or "?"}") of input {value.name} of {label} is open: {hint}')
    return tuple(result)
