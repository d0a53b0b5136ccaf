"""The tables of a target spec: names, types and limits of the fields of its TOML file.

``docs/target-spec.md`` explains every field to whoever writes one. Unknown fields are errors, so that a typing mistake
is not taken for a default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from tvm_hquant.cpu_features import normalize_feature
from tvm_hquant.errors import PrecisionError
from tvm_hquant.kernels.instruction_set import instruction_set_names
from tvm_hquant.precision import REALIZED, parse_precision
from tvm_hquant.target_spec.vocabulary import OPERATOR_KINDS, STORED_FORMATS

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
PositiveCount = Annotated[int, Field(gt=0)]


def matching(pattern: str, meaning: str) -> AfterValidator:
    """A validator for texts that match a regular expression, whose ``meaning`` is what the user reads."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"should be {meaning}")
        return text

    return AfterValidator(check)


def _operator_pattern(pattern: str) -> str:
    if not any(fnmatchcase(kind, pattern) for kind in OPERATOR_KINDS):
        raise ValueError(
            f"matches no operator; the operators are {', '.join(OPERATOR_KINDS)}, and * stands for any text"
        )
    return pattern


def _realized_precision(name: str) -> str:
    try:
        precision = parse_precision(name)
    except PrecisionError as error:
        raise ValueError(str(error)) from None
    if precision.carrier != precision:
        raise ValueError(f"has no kernel of its own; use one of {', '.join(REALIZED)}")
    return precision.name


def _precision_pattern(pattern: str) -> str:
    if any(character in pattern for character in "*?["):
        if not any(fnmatchcase(name, pattern) for name in REALIZED):
            raise ValueError(f"matches no precision; the precisions are {', '.join(REALIZED)}")
        return pattern
    return _realized_precision(pattern)


def _format_pattern(pattern: str) -> str:
    if not any(fnmatchcase(name, pattern) for name in STORED_FORMATS):
        raise ValueError(f"is no stored format; use one of {', '.join(STORED_FORMATS)}, or * for all")
    return pattern


def _instruction_set(name: str) -> str:
    if name not in instruction_set_names():
        raise ValueError(f"is no instruction set; use one of {', '.join(instruction_set_names())}")
    return name


def without_repetition(values: tuple[str, ...]) -> tuple[str, ...]:
    """The values themselves; ValueError where one is listed twice."""
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"lists {', '.join(repeated)} more than once")
    return values


CpuFeature = Annotated[Text, AfterValidator(normalize_feature)]
CpuFeatures = Annotated[tuple[CpuFeature, ...], AfterValidator(without_repetition)]
OperatorPattern = Annotated[Text, AfterValidator(_operator_pattern)]
PrecisionName = Annotated[Text, AfterValidator(_realized_precision)]
PrecisionPattern = Annotated[Text, AfterValidator(_precision_pattern)]
FormatPattern = Annotated[Text, AfterValidator(_format_pattern)]
InstructionSet = Annotated[Text, AfterValidator(_instruction_set)]
Rates = Annotated[Mapping[PrecisionName, Positive], Field(min_length=1)]


class Table(BaseModel):
    """A TOML table: immutable, no unknown fields, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TargetConfiguration(Table):
    """A TVM target, under TVM's own names (``tvm.target.Target``): a tag, or a kind with its options.

    Attributes:
        tag: name of a target that TVM knows, such as ``raspberry-pi/4b-aarch64``; other options override its own.
        kind: ``llvm``, ``cuda`` or ``c`` (C source), where no tag is given.
        mtriple: LLVM's triple; without it, the machine that compiles.
        mcpu: LLVM's name of the CPU; mattr: features added (``+dotprod``) or removed (``-sve``).
        mabi, mfloat_abi: of the ABI, where the triple leaves it open.
        num_cores: threads to plan for.
        arch: of a GPU, such as ``sm_87``.
    """

    tag: Text | None = None
    kind: Literal["llvm", "cuda", "c"] | None = None
    mtriple: Text | None = None
    mcpu: Text | None = None
    mattr: (
        tuple[Annotated[str, matching(r"[+-][\w.-]+", "+ or - and one of LLVM's features, such as +dotprod")], ...]
        | None
    ) = None
    mabi: Text | None = None
    mfloat_abi: Literal["hard", "soft"] | None = Field(default=None, alias="mfloat-abi")
    num_cores: PositiveCount | None = Field(default=None, alias="num-cores")
    arch: Annotated[str, matching(r"sm_\d+[a-z]?", "a GPU architecture such as sm_87")] | None = None

    @model_validator(mode="after")
    def _tag_or_kind(self) -> TargetConfiguration:
        if (self.tag is None) == (self.kind is None):
            raise ValueError("needs either tag (a target that TVM knows by name) or kind (llvm, cuda or c), not both")
        if self.kind == "cuda" and self.arch is None:
            raise ValueError('needs arch for kind = "cuda", such as arch = "sm_87"')
        if self.kind == "c" and (options := sorted(self.options().keys() - {"kind"})):
            raise ValueError(f'kind = "c" takes no other option, {", ".join(options)} belongs to the C compiler')
        if self.kind == "llvm" and self.arch is not None:
            raise ValueError('arch belongs to kind = "cuda"; an LLVM target names its CPU with mcpu')
        return self

    def options(self) -> dict[str, Any]:
        """What ``tvm.target.Target`` takes, without the options that are not given."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Target(TargetConfiguration):
    """The TVM target, its host processor where it is a GPU, and the compiler that links for it.

    Attributes:
        host: TVM target of the CPU that drives a GPU.
        cross_compiler: C compiler and linker for another machine, such as ``aarch64-linux-gnu-gcc``; without one, the
            compiler of the machine that compiles.
    """

    host: TargetConfiguration | None = None
    cross_compiler: Text | None = None

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"cross_compiler"})


class Unit(Table):
    """A part of the hardware that computes some operators in some precisions.

    Attributes:
        name: for messages and reports.
        operators: operator kinds that it serves; ``*`` stands for any text.
        clock_ghz: its clock under load, GHz.
        count: how many there are (cores, multiprocessors).
        macs_per_cycle: for each precision that it offers, best choice first, multiply-accumulates per cycle of one of
            its pipes; for operators without weights, elements per cycle.
        peak_per_cycle: for some of these precisions, what no kernel exceeds, where that is more.
        vector_pipes: how many pipes for whole vectors one of them has, where processors of the target differ in that.
        required_features: CPU features that it needs beyond those of the spec.
        channel_alignment: channels are computed in multiples of this.
        bit_exact: whether it computes the arithmetic contract's bits; else within the bound that the contract states for it.
    """

    name: Text
    operators: Annotated[tuple[OperatorPattern, ...], Field(min_length=1), AfterValidator(without_repetition)]
    clock_ghz: Positive
    count: PositiveCount = 1
    required_features: CpuFeatures = ()
    channel_alignment: PositiveCount = 1
    vector_pipes: PositiveCount = 1
    bit_exact: bool = True
    macs_per_cycle: Rates
    peak_per_cycle: Mapping[PrecisionName, Positive] = {}

    @model_validator(mode="after")
    def _peaks_are_above_rates(self) -> Unit:
        for name, peak in self.peak_per_cycle.items():
            if peak < self.macs_per_cycle.get(name, math.inf):
                raise ValueError(f"peak_per_cycle of {name} should be that of a rate of macs_per_cycle, and no less")
        return self

    @property
    def peaks(self) -> Mapping[str, float]:
        """For each precision that it offers, what no kernel exceeds, as ``macs_per_cycle`` has it."""
        return {**self.macs_per_cycle, **self.peak_per_cycle}

    @property
    def precisions(self) -> tuple[str, ...]:
        """Names of the precisions that it offers, best choice first."""
        return tuple(self.macs_per_cycle)

    def serves(self, operator_kind: str) -> bool:
        return any(fnmatchcase(operator_kind, pattern) for pattern in self.operators)


class Conversion(Table):
    """What a change of format costs: ``elements_per_cycle`` of one core, between stored formats (``*``: any).

    ``peak_elements_per_cycle`` is what no kernel exceeds, where that is more.
    """

    source: FormatPattern = Field(alias="from")
    destination: FormatPattern = Field(alias="to")
    elements_per_cycle: Positive
    peak_elements_per_cycle: Positive | None = None

    @property
    def peak(self) -> float:
        """Elements per cycle of one core that no kernel exceeds."""
        return max(self.elements_per_cycle, self.peak_elements_per_cycle or 0.0)


class Memory(Table):
    """Bandwidth and sizes. A limit that is not given is no limit.

    Attributes:
        bandwidth_gb_per_s: what large copies reach, read and written bytes together, 10⁹ bytes per second.
        l1_data_kib, l2_kib, l3_kib: cache sizes as one core sees them, KiB; 0 where there is none.
        l1_data_ways: lines that share a set of the first-level data cache; None where that is not known.
        l2_vector_instructions, line_instructions, other_core_line, shared_instructions: what it takes to fetch from afar and
            to share work (:class:`tvm_hquant.kernels.processor.Processor`); None where that was not measured.
        ram_mib: room for activations and weights while it runs, MiB.
        flash_mib: room for the artifact, MiB.
    """

    bandwidth_gb_per_s: Positive
    l1_data_kib: Annotated[int, Field(ge=0)] = 0
    l1_data_ways: PositiveCount | None = None
    l2_kib: Annotated[int, Field(ge=0)] = 0
    l3_kib: Annotated[int, Field(ge=0)] = 0
    l2_vector_instructions: Positive | None = None
    line_instructions: Positive | None = None
    other_core_line: Positive | None = None
    shared_instructions: Positive | None = None
    ram_mib: Positive | None = None
    flash_mib: Positive | None = None


class Forbidden(Table):
    """A precision (``*`` allowed) that some operators must not have, and why: the reason is shown to the user."""

    precision: PrecisionPattern
    operators: Annotated[tuple[OperatorPattern, ...], Field(min_length=1)] = ("*",)
    except_operators: tuple[OperatorPattern, ...] = ()
    reason: Text

    def forbids(self, precision: str, operator_kind: str) -> bool:
        return (
            fnmatchcase(precision, self.precision)
            and any(fnmatchcase(operator_kind, pattern) for pattern in self.operators)
            and not any(fnmatchcase(operator_kind, pattern) for pattern in self.except_operators)
        )


class Rules(Table):
    """What the hardware or its runtime insists on.

    Attributes:
        symmetric_activations_only: activation codes have zero point 0: of the integer precisions only ``int8`` remains.
        weight_scales: one scale per output channel, or one for all weights of a layer.
        power_of_two_scales: every scale is a power of two, so that requantizing is a shift.
        keep_float: patterns of layer names or operator kinds that stay in a float precision.
        bit_exact: leave out units and instruction sets that are not bit-exact.
        forbidden: single precisions ruled out, with reasons.
    """

    symmetric_activations_only: bool = False
    weight_scales: Literal["per-channel", "per-tensor"] = "per-channel"
    power_of_two_scales: bool = False
    keep_float: tuple[Text, ...] = ()
    bit_exact: bool = False
    forbidden: tuple[Forbidden, ...] = ()
