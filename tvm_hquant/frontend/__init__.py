"""From an ONNX file or a Relax module to the one form that all passes start from.

That form: one Relax function ``main`` with static shapes, whose first parameters are the model's inputs and whose other
parameters are its weights, named as in the model, their values attached (attributes ``num_input`` and ``params``). The
attributes ``hquant.inputs`` and ``hquant.outputs`` hold the model's own names of its inputs and outputs.
"""

from tvm_hquant.frontend.onnx_import import import_onnx
from tvm_hquant.frontend.relax_import import import_relax
from tvm_hquant.frontend.signature import TensorSignature, input_signature, output_signature

__all__ = ["TensorSignature", "import_onnx", "import_relax", "input_signature", "output_signature"]
