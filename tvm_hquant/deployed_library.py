"""The compiled library of an artifact where it runs: layer by layer, kernel by kernel, and as a whole."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvm_hquant import numerics
from tvm_hquant.concat_parts import ConcatPart, part_name
from tvm_hquant.errors import ArtifactError, DataError
from tvm_hquant.kernel_graph import KernelCall
from tvm_hquant.kernels.interface import Kernel, LayerConstants, NoConstants
from tvm_hquant.relax_ir.kernel_calls import is_view, kernel_symbol
from tvm_hquant.runtime import Artifact
from tvm_hquant.simulator.program import Program, Step
from tvm_hquant.stored_outputs import StoredOutputs, find_stored_outputs, in_channel_order, in_wider_buffers
from tvm_hquant.target_spec import read_target_spec
from tvm_hquant.tensor_format import STORAGE_DTYPE
from tvm_hquant.tuning.records import families_of_manifest

Array = npt.NDArray[Any]


class DeployedLibrary:
    """A library on this machine, or on a board behind an RPC server, with the weights that it does not hold itself.

    ``families`` are its kernel families.

    Args:
        artifact: a loaded or just compiled artifact; for a board it need not run here.
        rpc: ``HOST:PORT`` of a TVM RPC server on the target; this machine if not given.

    Raises:
        DataError: the address has the wrong form.
        ArtifactError: the library cannot be loaded, or nobody answers at the address.
    """

    def __init__(self, artifact: Artifact, rpc: str | None = None) -> None:
        self.name, self._is_remote = rpc or "this machine", rpc is not None
        spec = read_target_spec(artifact.manifest["target"]["spec"], "the artifact's target spec")
        self.families = families_of_manifest(artifact.manifest, spec)
        self._symbols = {str(e["name"]): str(e["function"]) for e in artifact.manifest["layers"] if e.get("function")}
        self._main: Any = None
        self._layers: dict[str, Any] = {}
        self._input_names = [str(e["name"]) for e in artifact.manifest["inputs"]]
        if rpc is None:
            self._device, self._library, self._machine = artifact.device, artifact.library, artifact.machine
            self._weights = self._on_device(artifact)
            return
        host, _, port = rpc.rpartition(":")
        if not host or not port.isdigit():
            raise DataError(f"--rpc {rpc!r} is not HOST:PORT, such as 192.0.2.7:9090")
        try:
            session = tvm.rpc.connect(host, int(port), session_timeout=600)
            session.upload(str(artifact.folder / artifact.manifest["library"]))
            self._library = session.load_module(artifact.manifest["library"])
        except (RuntimeError, OSError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise ArtifactError(
                f"cannot use the RPC server at {rpc}: {lines[-1]}; start it on the board with "
                f"'python3 -m tvm.exec.rpc_server --port {port}'"
            ) from None
        self._device = session.cuda(0) if artifact.manifest["target"]["device"] == "cuda" else session.cpu(0)
        self._machine = tvm.relax.VirtualMachine(self._library, self._device)
        self._weights = self._on_device(artifact)

    def _on_device(self, artifact: Artifact) -> dict[str, Any]:
        return {layer: self._tensor(array) for layer, array in artifact.packed_weights().items()}

    def run(self, sample: Mapping[str, Array]) -> list[Array]:
        """Outputs of the whole module for one sample."""
        if self._main is None:
            self._main = self._machine["main"]
        inputs = [self._tensor(sample[name]) for name in self._input_names]
        result = self._called(self._main, "main", [*inputs, *self._weights.values()])
        return [result.numpy()] if hasattr(result, "numpy") else [r.numpy() for r in result]

    def stored_outputs(self, program: Program) -> StoredOutputs:
        """How the library's layers store what they make, by the keys of a program."""
        calls = [KernelCall(step.key, step.request, step.inputs) for step in program.steps]
        return find_stored_outputs(calls, program.outputs, self.families)

    def run_layers(self, program: Program, sample: Mapping[str, Array]) -> dict[int, Array]:
        """Every tensor of one sample by its key in ``program``: each layer reads what the layers before it made.

        Channels are in the operators' order, whatever the order in which the library stores them.

        Raises:
            ArtifactError: the library lacks a layer.
        """
        values: dict[Any, Array] = dict(enumerate(sample.values()))
        stored = self.stored_outputs(program)
        kernels, parts = stored.kernels, stored.parts
        pairs: dict[Hashable, Array] = {}
        """By the tensor whose kernel stores it in turns with another one, both."""
        shuffles = {concat.shuffle: concat.tensor for concat in stored.interleaved.values()}
        for step in program.steps:
            inputs = [values[key] for key in stored.read(step.key, step.inputs)]
            if step.request is not None and is_view(step.request):
                values[step.key] = inputs[0].reshape(step.request.operator.output_shape)
            elif step.key in stored.concats:
                values[step.key] = self._run_concat(step, stored.concats[step.key], inputs)
            elif step.key in stored.interleaved:
                both = pairs[stored.interleaved[step.key].tensor]
                values[step.key] = np.concatenate([both[..., ::2], both[..., 1::2]], axis=-1)
            elif step.key in shuffles:
                values[step.key] = pairs[shuffles[step.key]]
            elif step.key in stored.shuffles or step.key in stored.slices:
                # The memory is the same; only what its channels are said to be is another.
                assert step.request is not None
                values[step.key] = numerics.evaluate(step.request, NoConstants(), inputs)
            elif step.key in parts:
                values[step.key] = self._run_part(step.name, parts[step.key], inputs)
            elif step.key in kernels:
                request, result = kernels[step.key].request, self.run_layer(step, inputs)
                if request.interleaved is not None:
                    pairs[step.key] = result
                values[step.key] = in_channel_order(request, result)
            else:
                values[step.key] = self.run_layer(step, inputs)
        return values

    def run_layer(self, step: Step, inputs: Sequence[Array]) -> Array:
        """What a layer of the library makes of these inputs, with the constants that were compiled into it.

        Raises:
            ArtifactError: the library lacks the layer.
        """
        return self._run(step.name, inputs)

    def _run(self, name: str, inputs: Sequence[Array]) -> Array:
        weights = [self._weights[name]] if name in self._weights else []
        function = self._layer(name)
        result: Array = self._called(function, self._symbols[name], [*map(self._tensor, inputs), *weights]).numpy()
        return result

    def _called(self, function: Any, symbol: str, arguments: Sequence[Any]) -> Any:
        """What a function of the machine gives for tensors."""
        if not self._is_remote:
            return function(*arguments)
        # Over RPC a function can give back neither several tensors nor one that it was given.
        self._machine.set_input(symbol, *arguments)
        self._machine.invoke_stateful(symbol)
        return self._machine.get_outputs(symbol)

    def _run_part(self, name: str, part: ConcatPart, inputs: Sequence[Array]) -> Array:
        """What a layer makes that writes into the buffer of a concatenation."""
        request = part.kernel.request
        buffer = [] if part.makes_buffer else [np.zeros(request.output_shape, STORAGE_DTYPE[request.output])]
        return in_channel_order(request, self._run(name, [*inputs, *buffer]))

    def _run_concat(self, step: Step, parts: Sequence[ConcatPart], inputs: Sequence[Array]) -> Array:
        """The buffer behind a concatenation: what layers wrote in place, and what is copied by layers of its own."""
        values = [
            self._run_part(part_name(step.name, number), part, [tensor]) if part.is_copy else tensor
            for number, (part, tensor) in enumerate(zip(parts, inputs, strict=True))
        ]
        return np.concatenate(values, axis=-1)

    def _layer(self, name: str) -> Any:
        # Looking a function up takes longer than most layers.
        if name not in self._layers:
            try:
                self._layers[name] = self._machine[self._symbols[name]]
            except (KeyError, ValueError, AttributeError, RuntimeError):
                raise ArtifactError(
                    f"the library has no layer {name}: it was made by another release or from another plan; compile the "
                    "model again"
                ) from None
        return self._layers[name]

    def run_kernel(self, kernel: Kernel, constants: LayerConstants, inputs: Sequence[Array]) -> Array | None:
        """What a kernel of the library makes of these inputs with *given* constants; None if it has no such kernel."""
        request = kernel.request
        try:
            function = self._library.get_function(kernel_symbol(kernel), query_imports=True)
        except (AttributeError, RuntimeError):
            return None
        activations = in_wider_buffers(request, inputs)
        before = np.zeros(request.output_shape, STORAGE_DTYPE[request.output])
        if request.overwritten is not None:
            before = activations.pop(request.overwritten)
        output = self._tensor(before)
        function(*(self._tensor(a) for a in (*activations, *kernel.pack(constants))), output)
        return in_channel_order(request, output.numpy())

    def _tensor(self, array: Array) -> Any:
        return tvm.runtime.tensor(np.ascontiguousarray(array), self._device)
