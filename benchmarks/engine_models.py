"""The networks that engines are compared with, made ready for each of them in one folder."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from benchmarks.bit_exact import zoo_plan
from benchmarks.own_model import OwnModel
from benchmarks.zoo import ROOT, ZooModel, zoo_folder
from tests.light_models import light_model_path, load_random_weights
from tests.onnx_models import random_inputs
from tvm_hquant import api
from tvm_hquant.artifact import compile_artifact
from tvm_hquant.calibration.data import open_data

_OPERATOR_SET = 13

PROCESS = Path(__file__).with_name("engine_process.py")

NETWORKS = {
    "resnet50": "ResNet-50",
    "inception_v1": "Inception v1",
    "shufflenet": "ShuffleNet v1",
    "squeezenet": "SqueezeNet",
    "mobilenetv2": "MobileNetV2 (zoo)",
}
"""Names on the command line and in tables. The first four are graphs inside the onnx package with random weights."""


def network_title(name: str) -> str:
    """What tables call a network: one of the user's own as its file."""
    return NETWORKS.get(name, name)


@dataclass(frozen=True)
class NetworkFiles:
    """Where the files of one network are, or will be once they are made: one of ``NETWORKS``, or ``own``."""

    name: str
    folder: Path
    own: OwnModel | None = None

    @property
    def inputs(self) -> Path:
        return self.folder / f"{self.name}.npz"

    @property
    def float_model(self) -> Path:
        return self.folder / f"{self.name}.onnx"

    @property
    def onnxruntime_u8s8(self) -> Path:
        return self.folder / f"{self.name}.u8s8.onnx"

    @property
    def onnxruntime_s8s8(self) -> Path:
        return self.folder / f"{self.name}.s8s8.onnx"

    @property
    def openvino_int8(self) -> Path:
        return self.folder / f"{self.name}.nncf.xml"

    def artifact(self, instruction_set: str, precision: str) -> Path:
        return self.folder / f"{self.name}.{instruction_set}.{precision}"

    @cached_property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        with np.load(self.inputs) as archive:
            return {name: archive[name].shape for name in archive.files}

    def make_float_model(self) -> None:
        """Writes the float model and one sample of normally distributed inputs, or those of a model of one's own."""
        written = self.float_model.stat().st_mtime if self.float_model.exists() else 0.0
        if written and (self.own is None or self.own.changed < written):
            return
        if self.own is not None:
            model, inputs = self.own.read()
        else:
            model = _float_network(self.name)
            inputs = random_inputs(model)
            for value in model.graph.input:  # open batch dimensions become 1, for every engine
                if value.name in inputs:
                    for dimension, size in zip(value.type.tensor_type.shape.dim, inputs[value.name].shape, strict=True):
                        dimension.dim_value = size
        for made_of_another in (self.onnxruntime_u8s8, self.onnxruntime_s8s8, self.openvino_int8):
            made_of_another.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez(self.inputs, **inputs)  # type: ignore[arg-type]
        onnx.save(model, self.float_model)

    def make_other_models(self, engines_python: str) -> None:
        """Writes the models that the other engines quantize by their own tools, where they are missing.

        What a tool of theirs does not quantize is left out of the comparison, and said.
        """
        model, inputs = str(self.float_model), str(self.inputs)
        tools = {
            self.onnxruntime_u8s8: ("quantize-onnxruntime", model, inputs, str(self.onnxruntime_u8s8), "QUInt8"),
            self.onnxruntime_s8s8: ("quantize-onnxruntime", model, inputs, str(self.onnxruntime_s8s8), "QInt8"),
            self.openvino_int8: ("quantize-openvino", model, inputs, str(self.openvino_int8)),
        }
        for path, command in tools.items():
            if not path.exists():
                try:
                    run_process(engines_python, *command)
                except SystemExit as failure:
                    if self.own is None:
                        raise
                    path.unlink(missing_ok=True)
                    print(f"{self.name} is compared without {path.name}: {failure}")

    def make_artifacts(self, instruction_set: str, target: str, precisions: tuple[str, ...]) -> None:
        """Compiles this repository's artifacts anew, one for each precision."""
        session = api.open_session(str(self.float_model), target, observer="min-max")
        with np.load(self.inputs) as archive:
            session.calibrate(open_data(dict(archive), session.signature))
        for precision in precisions:
            artifact = compile_artifact(session.mod, zoo_plan(session, precision), session.spec, name=self.name)
            artifact.save(self.artifact(instruction_set, precision))


def run_process(python: str, *arguments: str) -> str:
    """Runs a command of ``engine_process.py`` to its end; its standard output.

    Raises:
        SystemExit: it failed; its own messages say why.
    """
    done = subprocess.run(
        [python, str(PROCESS), *arguments], env=process_environment(), text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{python} {PROCESS.name} {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def process_environment(**changes: str) -> dict[str, str]:
    """The environment of an engine's process: this repository on Python's path, and what is given."""
    path = os.pathsep.join(p for p in (changes.pop("PYTHONPATH", ""), str(ROOT)) if p)
    return {**os.environ, "PYTHONPATH": path, **changes}


def _float_network(name: str) -> Any:
    if name == "mobilenetv2":
        model = ZooModel("imagenet_mobilenetv2_1.0.onnx")
        if not model.path.exists():
            raise SystemExit(f"{model.path} is missing: set HQUANT_ZOO, or leave {name} out of --networks")
        return onnx.load(model.path)
    return _modernized(load_random_weights(onnx.load(light_model_path(name)), 0))


def _modernized(model: Any) -> Any:
    """The same network as today's exporters write it, which the other engines need to be at their best.

    Weights are no graph inputs, so that they count as constants, and the operator set has scales per channel.
    """
    weights = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    return onnx.version_converter.convert_version(model, _OPERATOR_SET)


def available_networks() -> tuple[str, ...]:
    """All networks that this machine has the files of."""
    has_zoo = (zoo_folder() / "models").exists()
    return tuple(name for name in NETWORKS if has_zoo or name != "mobilenetv2")
