"""One engine with one network in a process of its own: prepares models for it, or times it when told to.

Runs under any Python that has the engine and NumPy; of this repository it needs only ``tvm_hquant.runtime``, and that for
artifacts alone.

    python engine_process.py time ENGINE MODEL INPUTS.npz THREADS      lines on standard input say how many runs
    python engine_process.py quantize-onnxruntime FLOAT.onnx INPUTS.npz OUTPUT.onnx QUInt8|QInt8
    python engine_process.py quantize-openvino FLOAT.onnx INPUTS.npz OUTPUT.xml
    python engine_process.py versions

``INPUTS.npz`` holds an array for each input, samples along the first axis: engines calibrate with all, and the first is timed.
``time`` answers ``ready``, then for each line a JSON list of seconds, one for each run: from the call to the output, with
the input where the engine wants it beforehand and the output left in its memory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

Runner = Callable[[], object]

_WARM_UP = 3


def onnxruntime_runner(model: str, inputs: dict[str, Any], threads: int) -> Runner:
    """ONNX Runtime: all graph optimizations, inputs and outputs bound once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_cpu_input(name, array)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def openvino_runner(model: str, inputs: dict[str, Any], threads: int) -> Runner:
    """OpenVINO: one stream, tuned for latency; float32 stays float32."""
    import openvino

    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "INFERENCE_NUM_THREADS": threads}
    if model.endswith(".onnx"):  # a float32 network; quantized ones may compute the rest as the engine likes best
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    for name, array in inputs.items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    return lambda: request.infer()


def artifact_runner(model: str, inputs: dict[str, Any], threads: int) -> Runner:
    """An artifact of this repository on TVM's runtime."""
    os.environ["TVM_NUM_THREADS"] = str(threads)
    import tvm

    from tvm_hquant.runtime import load_artifact

    artifact = load_artifact(model)
    tensors = [tvm.runtime.tensor(array) for array in artifact.checked_inputs(inputs).values()] + list(
        artifact.parameters
    )
    main = artifact.machine["main"]
    return lambda: main(*tensors)


_RUNNERS = {"onnxruntime": onnxruntime_runner, "openvino": openvino_runner, "tvm_hquant": artifact_runner}


def time_engine(engine: str, model: str, inputs_path: str, threads: str) -> None:
    """Answers every line on standard input, the number of runs, with their seconds."""
    _use_cores(int(threads))
    inputs = read_samples(inputs_path)[0]  # Engines read it where it is: it has to stay.
    run = _RUNNERS[engine](model, inputs, int(threads))
    run()
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(_WARM_UP):
            run()
        seconds = []
        for _ in range(int(line)):
            start = perf_counter()
            run()
            seconds.append(perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def read_samples(inputs_path: str) -> list[dict[str, Any]]:
    """The samples of a file, each with a batch axis of 1."""
    with np.load(inputs_path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return [{name: array[i : i + 1] for name, array in arrays.items()} for i in range(len(next(iter(arrays.values()))))]


def _use_cores(count: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < count:
            raise SystemExit(f"{count} threads need {count} cores, this process may use {len(allowed)}")
        os.sched_setaffinity(0, allowed[-count:])


def quantize_onnxruntime(model: str, inputs_path: str, output: str, activations: str) -> None:
    """A QDQ model with int8 weights per channel; the values of its scales do not matter for its speed."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Samples(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.samples = iter(read_samples(inputs_path))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.samples, None)

    prepared = str(Path(output).with_suffix(".prepared.onnx"))
    quant_pre_process(model, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        output,
        Samples(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType[activations],
        weight_type=QuantType.QInt8,
        extra_options={"ActivationSymmetric": activations == "QInt8", "WeightSymmetric": True},
    )
    Path(prepared).unlink()


def quantize_openvino(model: str, inputs_path: str, output: str) -> None:
    """NNCF's post-training quantization for CPUs, as its documentation shows it."""
    import nncf
    import openvino

    samples = read_samples(inputs_path)
    quantized = nncf.quantize(openvino.Core().read_model(model), nncf.Dataset(samples), subset_size=len(samples))
    openvino.save_model(quantized, output)


def print_versions() -> None:
    """Versions of the engines under this Python as a JSON object; null for those that it has not."""
    print(json.dumps({name: _version(name) for name in ("onnxruntime", "openvino", "nncf", "numpy")}))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


_COMMANDS: dict[str, Callable[..., None]] = {
    "time": time_engine,
    "quantize-onnxruntime": quantize_onnxruntime,
    "quantize-openvino": quantize_openvino,
    "versions": print_versions,
}

if __name__ == "__main__":
    _COMMANDS[sys.argv[1]](*sys.argv[2:])
