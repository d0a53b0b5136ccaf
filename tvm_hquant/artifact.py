"""Compiles a quantized model into an artifact: a folder with the library, the plan and the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import IRModule

from tvm_hquant.c_source import SOURCE_NAME, compile_function, find_c_compiler, module_source
from tvm_hquant.compilation import StageObserver, build_module, lower
from tvm_hquant.cuda_compilation import find_nvcc, pack_machine_code, source_kept
from tvm_hquant.errors import ArtifactError, ToolchainError
from tvm_hquant.formats import assign_formats
from tvm_hquant.kernels.registry import families_for_target
from tvm_hquant.layer_record import graph_record, save_weights
from tvm_hquant.layers import LayerGraph, read_layers
from tvm_hquant.opaque_functions import opaque_functions, save_opaque_functions
from tvm_hquant.operator_codec import to_jsonable
from tvm_hquant.passes.expose_layers import expose_layers, exposed_functions
from tvm_hquant.passes.lift_weights import lift_weights
from tvm_hquant.plan import PrecisionPlan
from tvm_hquant.precision import Arithmetic
from tvm_hquant.relax_ir.kernel_calls import BIT_EXACT_ATTRIBUTE, KERNEL_ATTRIBUTE, layers_of_functions
from tvm_hquant.report.quantization_report import QuantizationReport
from tvm_hquant.rounding.weight_rounding import rounding_for
from tvm_hquant.runtime import LIBRARY_NAME, MANIFEST_VERSION, PACKED_WEIGHTS_NAME, Artifact
from tvm_hquant.stored_weights import StoredWeights
from tvm_hquant.target_spec import TargetSpec
from tvm_hquant.tuning.records import Record, measured_traces, tuned_families
from tvm_hquant.weight_storage import packed_weights

_CODE_BYTES = 8 * 2**20
"""Room that is asked for besides the constants, generously: for compiled code and the linker's tables."""


def compile_artifact(
    module: IRModule,
    plan: PrecisionPlan,
    spec: TargetSpec,
    report: QuantizationReport | None = None,
    name: str = "model",
    observe: StageObserver | None = None,
    tuning: Sequence[Record] = (),
) -> Artifact:
    """Compiles a partitioned module under a plan for a target.

    ``tuning`` holds measured tiles and schedules for the target's CPU; they change no result.

    The files are in a temporary folder that goes with the object: :meth:`Artifact.save` keeps them.

    Raises:
        PlanError, PrecisionError: the plan does not fit the model or the target.
        ToolchainError: the target's compiler or linker is missing, or TVM cannot generate code for it.
        TuningError: a measured schedule does not fit its function.
    """
    graph = read_layers(module)
    plan = plan.completed(graph, rounding_for(spec.rules))
    families = tuned_families(families_for_target(spec.instruction_sets, spec.processor), tuning)
    lowered = lower(module, plan, spec, families, observe)
    stored = packed_weights(lowered, plan, families)
    deployed = expose_layers()(lift_weights(tuple(stored))(lowered) if stored else lowered)
    with source_kept():
        executable = build_module(deployed, spec.tvm_target(), spec.name, measured_traces(tuning))
    folder = Path(tempfile.mkdtemp(prefix="tvm_hquant_"))
    try:
        _check_space(folder, graph)
        _export(executable, folder / LIBRARY_NAME, spec)
        if spec.tvm_target().kind.name == "c":
            source = module_source(executable, layers_of_functions(lowered))
            (folder / SOURCE_NAME).write_text(source, encoding="utf-8")
        plan.save(folder)
        floats = [n for n, d in plan.layers.items() if d.weight_precision.arithmetic is Arithmetic.FLOAT]
        save_weights(folder / "weights.npz", graph, floats)
        if spec.tvm_target().kind.name == "llvm":
            save_opaque_functions(folder, opaque_functions(deployed, spec.tvm_target()))
        if stored:
            (folder / PACKED_WEIGHTS_NAME).write_bytes(b"".join(w.data for w in stored.values()))
        manifest = _manifest(graph, lowered, plan, spec, report, name, folder, exposed_functions(deployed), stored)
        if tuning:
            manifest["tuning"] = [record.to_jsonable() for record in tuning]
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArtifactError(f"cannot write to {folder}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    artifact = Artifact(folder, manifest)
    weakref.finalize(artifact, shutil.rmtree, folder, ignore_errors=True)
    return artifact


def _check_space(folder: Path, graph: LayerGraph) -> None:
    """Makes sure that object files and library fit on the disk: where they do not, LLVM ends the whole process.

    Raises:
        OSError: they do not.
    """
    constants = sum(4 * layer.parameter_count for layer in graph.layers)
    if hasattr(os, "posix_fallocate"):
        with tempfile.TemporaryFile(dir=folder) as file:
            # Object files, library and plan hold the constants once each.
            os.posix_fallocate(file.fileno(), 0, 3 * constants + _CODE_BYTES)


_PACKAGES = {"aarch64-linux-gnu-gcc": "Debian's gcc-aarch64-linux-gnu", "oa64-clang": "osxcross"}
"""Where cross compilers of the project's specs come from."""


def check_linker(spec: TargetSpec) -> None:
    """Makes sure that this machine has the compilers with which libraries for a target are made and linked.

    Raises:
        ToolchainError: it has not.
    """
    if spec.tvm_target().kind.name == "cuda":
        find_nvcc()
    if spec.tvm_target().kind.name == "c":
        find_c_compiler()
    compiler = spec.target.cross_compiler
    if compiler is not None and shutil.which(compiler) is None:
        package = _PACKAGES.get(compiler)
        raise ToolchainError(
            f"the target {spec.name} is linked with {compiler}, which this machine does not have: install it"
            f"{f' ({package} has it)' if package else ''}, or name another one as target.cross_compiler in the spec"
        )
    if compiler is None and not any(shutil.which(c) for c in ("g++", "gcc", "cc", "clang", "c++")):
        raise ToolchainError("no C compiler was found to link the library: install gcc or clang")


def _export(executable: Any, path: Path, spec: TargetSpec) -> None:
    check_linker(spec)
    options: dict[str, Any] = {}
    if (compiler := spec.target.cross_compiler) is not None:
        options["fcompile"] = tvm.support.cc.cross_compiler(compiler)
    if (target := spec.tvm_target()).kind.name == "c":
        options["fcompile"] = compile_function()
    if target.kind.name == "cuda":
        options["fpack_imports"] = pack_machine_code(str(target.attrs["arch"]))
    try:
        executable.export_library(str(path), **options)
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ToolchainError(f"cannot link {path.name} for {spec.name}: {lines[-1]}") from error


def _manifest(
    graph: LayerGraph,
    lowered: IRModule,
    plan: PrecisionPlan,
    spec: TargetSpec,
    report: QuantizationReport | None,
    name: str,
    folder: Path,
    functions: Mapping[str, str],
    stored: Mapping[str, StoredWeights],
) -> dict[str, Any]:
    formats = assign_formats(graph, plan.precisions(), plan.scales)
    target = spec.tvm_target()
    outputs = [
        {"name": n, "shape": list(graph.tensor_shape(t)), "dtype": "float32"}
        for n, t in zip(graph.output_names, graph.outputs, strict=True)
    ]
    return {
        "version": MANIFEST_VERSION,
        "model": name,
        "library": LIBRARY_NAME,
        "inputs": graph_record(graph)["inputs"],
        "outputs": outputs,
        "target": {
            "name": spec.name,
            "hash": spec.spec_hash(),
            "spec": spec.to_toml(),
            "machine": _machine(target),
            "device": "cuda" if target.kind.name == "cuda" else "cpu",
            "required_cpu_features": sorted(spec.cpu_features_needed()),
        },
        "quantization": {
            "tensors": {t: to_jsonable(f) for t, f in formats.produced.items()},
            "conversions": len(formats.conversions(graph)),
        },
        "layers": [
            {
                "name": layer.name,
                "precision": plan.layers[layer.name].precision if layer.name in plan.layers else "",
                "kernel": _kernel_of(lowered, layer.function_name),
                "bit_exact": BIT_EXACT_ATTRIBUTE not in (lowered[layer.function_name].attrs or {}),
                "function": functions.get(layer.name, ""),
            }
            for layer in read_layers(lowered).layers
        ],
        "packed_weights": [{"layer": layer, **weights.record()} for layer, weights in stored.items()],
        "graph": graph_record(graph),
        "measured": report.to_jsonable() if report is not None else None,
        "versions": {
            "tvm_hquant": version("tvm-hquant"),
            "tvm": tvm.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "files": {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.iterdir())
            if p.name != "manifest.json"
        },
    }


def _kernel_of(lowered: IRModule, function_name: str) -> str:
    attributes: Mapping[str, Any] = lowered[function_name].attrs
    return str(attributes[KERNEL_ATTRIBUTE]) if KERNEL_ATTRIBUTE in attributes else "tvm"


def _machine(target: Any) -> str:
    """The architecture that ``uname -m`` names on the target."""
    host = target.host if target.kind.name == "cuda" and target.host else target
    triple = str(host.attrs["mtriple"]) if "mtriple" in host.attrs else ""
    return triple.split("-", 1)[0] if triple else platform.machine()
