"""Mixed-precision quantization for Apache TVM: what is simulated is what runs.

``import tvm_hquant as hq`` gives the functions of :mod:`tvm_hquant.api` and the classes around them. Names are loaded on
first use, so that ``tvm_hquant.runtime`` works where only TVM's runtime is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_hquant.api import (
        PlannedQuantizer as PlannedQuantizer,
    )
    from tvm_hquant.api import (
        compile as compile,
    )
    from tvm_hquant.api import (
        create_quantizer as create_quantizer,
    )
    from tvm_hquant.api import (
        lowered_module as lowered_module,
    )
    from tvm_hquant.api import (
        open_session as open_session,
    )
    from tvm_hquant.api import (
        quantize as quantize,
    )
    from tvm_hquant.api import (
        search_front as search_front,
    )
    from tvm_hquant.api import (
        search_strategy as search_strategy,
    )
    from tvm_hquant.errors import HQuantError as HQuantError
    from tvm_hquant.plan import LayerDecision as LayerDecision
    from tvm_hquant.plan import PrecisionPlan as PrecisionPlan
    from tvm_hquant.plan import load_plan as load_plan
    from tvm_hquant.precision import parse_precision as parse_precision
    from tvm_hquant.quantizer import Options as Options
    from tvm_hquant.quantizer import QuantizationResult as QuantizationResult
    from tvm_hquant.relax_pipeline import attach_plan as attach_plan
    from tvm_hquant.runtime import Artifact as Artifact
    from tvm_hquant.runtime import load_artifact as load_artifact
    from tvm_hquant.target_spec import TargetSpec as TargetSpec
    from tvm_hquant.target_spec import detect_host as detect_host
    from tvm_hquant.target_spec import load_target_spec as load_target_spec
    from tvm_hquant.verification import verify_artifact as verify_artifact

_HOMES = {
    "api": (
        "PlannedQuantizer", "compile", "create_quantizer", "lowered_module", "open_session", "quantize", "search_front",
        "search_strategy",
    ),
    "errors": ("HQuantError",),
    "plan": ("LayerDecision", "PrecisionPlan", "load_plan"),
    "precision": ("parse_precision",),
    "quantizer": ("Options", "QuantizationResult"),
    "relax_pipeline": ("attach_plan",),
    "runtime": ("Artifact", "load_artifact"),
    "target_spec": ("TargetSpec", "detect_host", "load_target_spec"),
    "verification": ("verify_artifact",),
}  # fmt: skip
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"tvm_hquant.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module 'tvm_hquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
