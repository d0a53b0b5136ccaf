"""Every error that a user can cause, as one family of exceptions.

The command line prints the message of an :class:`HQuantError` alone and exits with code 2. A message names the
layer, tensor or file, says what was found and what is allowed, and ends with what to do.
"""

from __future__ import annotations


class HQuantError(Exception):
    """Base of all errors whose cause lies in what the user gave: a file, an option, data, a machine."""


class ModelError(HQuantError):
    """The float model cannot be read, or holds something that cannot be imported."""


class DataError(HQuantError):
    """Calibration, evaluation or input data do not fit the model, are empty, or hold NaN or infinity."""


class TargetSpecError(HQuantError):
    """A target spec is missing, has a wrong field, or contradicts itself."""


class PrecisionError(HQuantError):
    """A precision is unknown, not offered by the target, or impossible for a layer."""


class PlanError(HQuantError):
    """A precision plan cannot be read or belongs to another model."""


class KernelError(HQuantError):
    """No kernel of the chosen family computes what was asked for."""


class ArtifactError(HQuantError):
    """An artifact is incomplete, cannot be written, or needs what this machine does not have."""


class ToolchainError(HQuantError):
    """A compiler or linker that the target needs is missing on this machine, or refused its input."""


class BudgetError(HQuantError):
    """No plan keeps the loss within the budget."""


class JournalError(HQuantError):
    """A journal of evaluations cannot be read or written, or is another file."""


class SearchError(HQuantError):
    """A search strategy is unknown, or cannot do what is asked of it."""


class TuningError(HQuantError):
    """Tuning records cannot be read, written or made."""
