"""Reads an ONNX file and says clearly what is wrong with it, before anything is imported."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.inliner
import onnx.numpy_helper
from google.protobuf.message import DecodeError

from tvm_hquant.errors import ModelError

_OLDEST_OPSET = 9
_CHECKER_LIMIT_BYTES = 2**31 - 1
_STANDARD_DOMAINS = ("", "ai.onnx")
_CONTRIBUTED_DOMAIN = "com.microsoft"
_CONTRIBUTED_OPERATORS = ("Gelu", "FastGelu", "BiasGelu", "SkipLayerNormalization", "EmbedLayerNormalization")
_DROPPED_PREFIX = "onnx::"
_CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")
_RECURRENT = ("LSTM", "GRU", "RNN")
_SIZED_BY_VALUES = ("NonMaxSuppression", "NonZero", "Unique", "Compress")
_WITHOUT = "onnx.utils.extract_model cuts a file at tensors that it is told"
_INPUT_TYPES = ("FLOAT", "UINT8", "INT8", "INT32", "INT64", "BOOL")


def read_onnx(source: str | os.PathLike[str] | Any) -> tuple[Any, str]:
    """A model proto with all weights inside, and what to call the model in messages. A given proto is copied.

    Raises:
        ModelError: the file or its external data are missing or damaged, or the model is one that cannot be imported.
    """
    if isinstance(source, onnx.ModelProto):
        model, label = onnx.ModelProto(), "the ONNX model"
        model.CopyFrom(source)
        folder = None
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        model, label, folder = _parse(path), str(path), path.parent
    else:
        raise ModelError(f"a model is a path, an onnx.ModelProto or a Relax IRModule, not a {type(source).__name__}")
    _check_is_model(model, label)
    _load_external_data(model, folder, label)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_opset(model, label)
    _check_inputs_and_outputs(model, label)
    _check_operators(model, label)
    _check_weights(model, label)
    return model, label


def node_label(node: Any) -> str:
    """How messages call a node: its name, else its first output."""
    return str(node.name or (node.output[0] if node.output else "without a name"))


def model_inputs(graph: Any) -> list[Any]:
    """Graph inputs without the initializers, which ONNX before IR version 4 lists among them."""
    initializers = {i.name for i in graph.initializer}
    return [i for i in graph.input if i.name not in initializers]


def replace_nodes(graph: Any, spelled: Callable[[Any], Sequence[Any] | None]) -> None:
    """Puts in place of each node what ``spelled`` gives for it; None keeps it."""
    nodes: list[Any] = []
    for node in graph.node:
        others = spelled(node)
        nodes += [node] if others is None else others
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def check_structure(model: Any, label: str) -> None:
    """ONNX's own checker, on a model proto of our own whose inputs have shapes.

    Raises:
        ModelError: the graph is no valid one.
    """
    if model.graph.sparse_initializer:
        raise ModelError(f"{label}: sparse weights are not supported: store them dense")
    # IR version 3 wants every initializer among the graph inputs; exporters and tools have not always kept to that.
    model.ir_version = max(model.ir_version, 4)
    if model.ByteSize() > _CHECKER_LIMIT_BYTES:
        return
    # The checker wants a shape for every output, which other engines do not need and nothing here reads.
    for output in model.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{label} is no valid ONNX model: {_first_line(str(error))}") from error


def check_output_shapes(model: Any, label: str) -> None:
    """Refuses transposed convolutions that are told by ``output_shape``: TVM's importer would take no notice of it.

    Raises:
        ModelError: there is one.
    """
    for node in model.graph.node:
        if node.op_type == "ConvTranspose" and any(a.name == "output_shape" for a in node.attribute):
            raise ModelError(
                f"{label}: TVM's importer leaves out the attribute output_shape of ConvTranspose (node {node_label(node)}): "
                "give pads and output_padding in its place"
            )


def check_sizes(model: Any, label: str) -> None:
    """Refuses operators whose outputs are as long as the values have it, once what follows from shapes has been folded.

    Raises:
        ModelError: there is one.
    """
    constants = {o for node in model.graph.node if node.op_type == "Constant" for o in node.output}
    constants |= {"", *(t.name for t in model.graph.initializer)}
    for node in model.graph.node:
        if node.op_type in _SIZED_BY_VALUES:
            found = ", ".join(name for name in node.input if name not in constants)
            raise ModelError(
                f"{label}: how many values operator {node.op_type} (node {node_label(node)}) gives is known only at run time: "
                f"end the model before it, with the outputs {found} ({_WITHOUT}), and do the rest on what it gives"
            )


def _parse(path: Path) -> Any:
    if not path.exists():
        raise ModelError(f"{path}: there is no such file")
    if path.is_dir():
        raise ModelError(f"{path} is a folder: give the .onnx file in it")
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path} is no ONNX model, or is cut short or damaged: export or download it again") from error


def _check_is_model(model: Any, label: str) -> None:
    if model.ir_version < 3 or not model.opset_import:
        raise ModelError(f"{label} is no ONNX model (it has no IR version of 3 or later and opset): export it again")
    if not model.graph.node and not model.graph.output:
        raise ModelError(f"{label} holds an empty graph, or is cut short: export or download it again")


def _load_external_data(model: Any, folder: Path | None, label: str) -> None:
    external = [t for t in model.graph.initializer if onnx.external_data_helper.uses_external_data(t)]
    if not external:
        return
    if folder is None:
        raise ModelError(
            f"{label} keeps weights such as {external[0].name} in another file: load it with "
            "onnx.load(path, load_external_data=True), or give the path"
        )
    location = next((e.value for e in external[0].external_data if e.key == "location"), "an unnamed file")
    try:
        onnx.external_data_helper.load_external_data_for_model(model, str(folder))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"{label} keeps weights such as {external[0].name} in {folder / location}, which is missing, too short or "
            "cannot be read: put it beside the model"
        ) from error
    for tensor in external:
        needed = int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if len(tensor.raw_data) != needed:
            raise ModelError(
                f"{label}: weight {tensor.name} has {len(tensor.raw_data)} bytes in its external file but needs {needed}: "
                "the file is cut short or belongs to another model"
            )


def _check_opset(model: Any, label: str) -> None:
    versions = [o.version for o in model.opset_import if o.domain in _STANDARD_DOMAINS]
    if not versions:
        raise ModelError(f"{label} imports no version of the standard ONNX operators: export it again")
    if versions[0] < _OLDEST_OPSET:
        raise ModelError(
            f"{label} has opset {versions[0]}; {_OLDEST_OPSET} and later are supported: export it again, or convert it "
            "with onnx.version_converter"
        )


def _check_inputs_and_outputs(model: Any, label: str) -> None:
    if not model.graph.output:
        raise ModelError(f"{label} has no outputs: export it with at least one")
    inputs = model_inputs(model.graph)
    if not inputs:
        raise ModelError(f"{label} has no inputs: its outputs are constants, there is nothing to quantize")
    for value in inputs:
        if not value.type.HasField("tensor_type"):
            raise ModelError(
                f"{label}: input {value.name} is no tensor but a sequence, map or optional: export tensors only"
            )
        name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
        if name not in _INPUT_TYPES:
            allowed = ", ".join(t.lower() for t in _INPUT_TYPES)
            raise ModelError(
                f"{label}: input {value.name} has dtype {name.lower()}; allowed are {allowed} (float is float32): "
                "convert the model to float32"
            )


def _check_operators(model: Any, label: str) -> None:
    for node in model.graph.node:
        kind = f"operator {node.op_type} (node {node_label(node)})"
        if node.op_type in _CONTROL_FLOW:
            raise ModelError(
                f"{label}: {kind} is control flow, which is not supported: export the model by tracing it with fixed shapes, "
                f"or without that part ({_WITHOUT})"
            )
        if node.op_type in _RECURRENT:
            raise ModelError(
                f"{label}: {kind} is recurrent, which is not supported: export its steps written out for a fixed length "
                f"(MatMul, Sigmoid, Tanh), or the parts before and behind it as models of their own ({_WITHOUT})"
            )
        if node.op_type.startswith(("QLinear", "QuantizeLinear", "DequantizeLinear", "DynamicQuantize")) or (
            node.op_type.endswith("Integer")
        ):
            raise ModelError(f"{label}: {kind} shows that the model is quantized already: give the float model")
        is_known = node.domain in _STANDARD_DOMAINS or (
            node.domain == _CONTRIBUTED_DOMAIN and node.op_type in _CONTRIBUTED_OPERATORS
        )
        if not is_known:
            raise ModelError(
                f"{label}: {kind} is of the domain {node.domain}, for which there is no importer: export the model with "
                "standard ONNX operators"
            )


def _check_weights(model: Any, label: str) -> None:
    names = {t.name for t in model.graph.initializer}
    doubled = [n for n in names if n.startswith(_DROPPED_PREFIX) and n.removeprefix(_DROPPED_PREFIX) in names]
    if doubled:
        raise ModelError(
            f"{label}: weights {doubled[0]} and {doubled[0].removeprefix(_DROPPED_PREFIX)} differ by a prefix "
            "that TVM's importer drops: rename one of them"
        )
    for tensor in _float_weights(model.graph.initializer):
        try:
            values = onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{label}: weight {tensor.name} is damaged: {_first_line(str(error))}") from error
        if not np.all(np.isfinite(values)):
            raise ModelError(f"{label}: weight {tensor.name} holds NaN or infinity: export the model again")


def _float_weights(initializers: Iterable[Any]) -> list[Any]:
    """Weights of at least one axis; a lone number may be infinite, as a bound that does not bound."""
    types = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
    return [t for t in initializers if t.data_type in types and len(t.dims) > 0]


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "no reason given")
