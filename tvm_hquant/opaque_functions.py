"""The functions that TVM makes of operators without a kernel of this project: collected for tuning, kept in artifacts as text.

One operator may become several functions, or none, and equal ones of several layers are one. A function is named by a hash of
its structure, which does not depend on names of variables and is the same in every process.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import IRModule, relax, tirx

from tvm_hquant.errors import ArtifactError
from tvm_hquant.layers import LAYER_ATTRIBUTE
from tvm_hquant.relax_ir.kernel_calls import KERNEL_ATTRIBUTE

FILE_NAME = "opaque_functions.json"


@dataclass(frozen=True)
class OpaqueFunction:
    """A function that TVM made.

    Attributes:
        digest: names it (:func:`function_digest`).
        name: what TVM calls it, for people.
        layers: that call it.
        script: the function as TVMScript.
    """

    digest: str
    name: str
    layers: tuple[str, ...]
    script: str


def function_digest(function: Any) -> str:
    """A hash of a function's structure, its symbol aside, as 16 hexadecimal digits."""
    return f"{tvm_ffi.structural_hash(function.without_attr('global_symbol')):016x}"


def legalization() -> Sequence[Any]:
    """The passes that turn operators into calls of functions; they need a target in their context."""
    return (
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
    )


def opaque_functions(mod: IRModule, target: Any) -> tuple[OpaqueFunction, ...]:
    """What TVM makes of the opaque layers of a module whose layers are lowered.

    Functions of unknown shapes, or whose text does not read back as the same function, are left out.
    """
    kept = {
        variable: function
        for variable, function in mod.functions_items()
        if not isinstance(function, relax.Function) or _is_opaque(function)
    }
    if not any(isinstance(function, relax.Function) for function in kept.values()):
        return ()
    with target:
        legalized = tvm.transform.Sequential([*legalization()])(IRModule(kept))
    found: dict[str, OpaqueFunction] = {}
    for _, layer in legalized.functions_items():
        if not isinstance(layer, relax.Function):
            continue
        for variable in _called(layer):
            function = legalized[variable]
            digest = function_digest(function)
            layers = (*(found[digest].layers if digest in found else ()), str(layer.attrs[LAYER_ATTRIBUTE]))
            script = function.without_attr("global_symbol").script(show_meta=True)
            if _has_known_shapes(function) and function_digest(tvm.script.from_source(script)) == digest:
                found[digest] = OpaqueFunction(digest, variable.name_hint, tuple(dict.fromkeys(layers)), script)
    return tuple(found.values())


def save_opaque_functions(folder: Path, functions: Sequence[OpaqueFunction]) -> None:
    """Writes the file of an artifact; none where there are no functions."""
    if functions:
        text = json.dumps([asdict(function) for function in functions], indent=1)
        (folder / FILE_NAME).write_text(f"{text}\n", encoding="utf-8")


def load_opaque_functions(folder: Path) -> tuple[OpaqueFunction, ...]:
    """Reads the file of an artifact.

    Raises:
        ArtifactError: it is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return tuple(OpaqueFunction(**{**entry, "layers": tuple(entry["layers"])}) for entry in entries)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); compile the model again") from None


def _is_opaque(function: Any) -> bool:
    attributes = function.attrs or {}
    return LAYER_ATTRIBUTE in attributes and KERNEL_ATTRIBUTE not in attributes


def _called(function: Any) -> list[Any]:
    """Functions of loops that a Relax function calls, each once."""
    found: dict[Any, None] = {}

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") in (
            "relax.call_tir",
            "relax.call_tir_inplace",
        ):
            found[node.args[0]] = None

    relax.analysis.post_order_visit(function, visit)
    return list(found)


def _has_known_shapes(function: Any) -> bool:
    return all(hasattr(p, "shape") and all(isinstance(size, tirx.IntImm) for size in p.shape) for p in function.params)
