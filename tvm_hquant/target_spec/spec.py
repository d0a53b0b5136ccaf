"""A target spec: what a piece of hardware computes, what it costs, what it forbids, and the questions asked of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Set
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tvm_hquant.cpu_features import normalize_features
from tvm_hquant.errors import PrecisionError, TargetSpecError
from tvm_hquant.kernels.instruction_set import load_instruction_set
from tvm_hquant.kernels.processor import CACHE_LINE, Processor
from tvm_hquant.precision import A16W16, Arithmetic, Precision, parse_precision
from tvm_hquant.target_spec.schema import (
    Conversion,
    CpuFeatures,
    InstructionSet,
    Memory,
    Rules,
    Table,
    Target,
    Text,
    Unit,
    matching,
    without_repetition,
)
from tvm_hquant.target_spec.toml_text import toml_text
from tvm_hquant.target_spec.tvm_target import build_target, host_problems
from tvm_hquant.target_spec.vocabulary import (
    OPERATOR_KINDS,
    OPERATORS_WITH_WEIGHTS,
    STORED_FORMATS,
)

_MEASURED = ("l2_vector_instructions", "line_instructions", "other_core_line", "shared_instructions")
"""Fields of a spec's memory that a processor has under the same names."""


class TargetSpec(Table):
    """A validated target spec; see ``docs/target-spec.md`` for its fields.

    Attributes:
        schema_version: of this layout; 1.
        name: short, unique among the specs in use.
        description: for people; no part of :meth:`spec_hash`.
        target: the TVM target and the compiler that links for it.
        instruction_sets: best first; the first that has a kernel for a layer computes it.
        required_cpu_features: what the CPU must have beyond what units and instruction sets need.
        units, conversions, memory, rules: see the classes of :mod:`tvm_hquant.target_spec.schema`.
    """

    schema_version: Literal[1]
    name: Annotated[str, matching(r"[a-z0-9][a-z0-9._-]*", "lower-case letters, digits, dots, hyphens or underscores")]
    description: Text
    target: Target
    instruction_sets: Annotated[tuple[InstructionSet, ...], Field(min_length=1), AfterValidator(without_repetition)]
    required_cpu_features: CpuFeatures = ()
    units: Annotated[tuple[Unit, ...], Field(min_length=1)]
    conversions: Annotated[tuple[Conversion, ...], Field(min_length=1)]
    memory: Memory
    rules: Rules = Rules()

    @model_validator(mode="after")
    def _consistent(self) -> TargetSpec:
        names = [unit.name for unit in self.units]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two units are called {', '.join(repeated)}; give each a name of its own")
        if not any(self.offered_precisions(kind) for kind in OPERATORS_WITH_WEIGHTS):
            raise ValueError("no unit offers any convolution or dense layer a precision that the rules allow")
        formats = self._stored_formats()
        for source in formats:
            for destination in formats:
                if source != destination and self._conversion(source, destination) is None:
                    raise ValueError(
                        f"no entry of conversions covers {source} → {destination}; add it, "
                        'or end the list with an entry from = "*", to = "*"'
                    )
        return self

    def __hash__(self) -> int:
        return hash(self.spec_hash())

    def offered_precisions(self, operator_kind: str, layer_name: str | None = None) -> tuple[str, ...]:
        """Names of the precisions that an operator can have here, in order of preference: as the units list them.

        Operators without weights get one name for each format of activations (``a8w8`` stands for ``a8w4``, ``a16w8``
        for ``a16w16``, ``float32`` for ``w4``). Empty where nothing computes the operator.

        Raises:
            TargetSpecError: ``operator_kind`` is no operator kind.
        """
        self._check_operator_kind(operator_kind)
        names = dict.fromkeys(
            _equivalent(parse_precision(name), operator_kind).name
            for unit in self.units
            if unit.serves(operator_kind)
            for name in unit.precisions
        )
        return tuple(name for name in names if self.reason_against(name, operator_kind, layer_name) is None)

    def rule_against(self, precision: str, operator_kind: str, layer_name: str | None = None) -> str | None:
        """What the rules say against a precision for a layer, for people; None where they say nothing.

        Raises:
            PrecisionError: ``precision`` is no precision.
            TargetSpecError: ``operator_kind`` is no operator kind.
        """
        self._check_operator_kind(operator_kind)
        wanted = _equivalent(parse_precision(precision), operator_kind)
        if wanted.arithmetic is not Arithmetic.FLOAT:
            pattern = self._keep_float_pattern(operator_kind, layer_name)
            if pattern is not None:
                return f"the spec {self.name} keeps {pattern} in float (rules.keep_float)"
        for entry in self.rules.forbidden:
            if entry.forbids(wanted.name, operator_kind):
                return f"the spec {self.name} forbids {wanted.name} for {operator_kind}: {entry.reason}"
        if self.rules.symmetric_activations_only and wanted.is_integer and not wanted.symmetric:
            return f"the spec {self.name} allows only symmetric activations, {wanted.name} has zero points; use int8"
        return None

    def reason_against(self, precision: str, operator_kind: str, layer_name: str | None = None) -> str | None:
        """Why a layer cannot have a precision here, for people; None if it can.

        Raises:
            PrecisionError: ``precision`` is no precision.
            TargetSpecError: ``operator_kind`` is no operator kind.
        """
        against = self.rule_against(precision, operator_kind, layer_name)
        if against is not None:
            return against
        wanted = _equivalent(parse_precision(precision), operator_kind)
        if not self._units_for(wanted, operator_kind):
            return f"no unit of {self.name} computes {operator_kind} in {wanted.name}"
        return None

    def unit_for(self, precision: str, operator_kind: str) -> Unit:
        """The unit that computes an operator in a precision: the fastest of those that offer it.

        Raises:
            PrecisionError: the precision is unknown or not offered for the operator; the message says why.
            TargetSpecError: ``operator_kind`` is no operator kind.
        """
        return self._fastest(precision, operator_kind)[0]

    def macs_per_cycle(self, precision: str, operator_kind: str) -> float:
        """Multiply-accumulates (elements, for operators without weights) per cycle of one core or multiprocessor.

        Raises:
            PrecisionError, TargetSpecError: as :meth:`unit_for`.
        """
        return self._fastest(precision, operator_kind)[1]

    def macs_per_second(self, precision: str, operator_kind: str, cores: int | None = None) -> float:
        """Multiply-accumulates (elements) per second of ``cores`` cores, by default of all that the unit has.

        Raises:
            PrecisionError, TargetSpecError: as :meth:`unit_for`.
        """
        unit, rate = self._fastest(precision, operator_kind)
        return rate * unit.clock_ghz * 1e9 * min(unit.count, cores or unit.count)

    def peak_per_second(self, precision: str, operator_kind: str, cores: int | None = None) -> float:
        """Multiply-accumulates (elements) per second that no kernel on ``cores`` cores exceeds.

        Raises:
            PrecisionError, TargetSpecError: as :meth:`unit_for`.
        """
        self.unit_for(precision, operator_kind)
        units = self._units_for(_equivalent(parse_precision(precision), operator_kind), operator_kind, peaks=True)
        return max(peak * u.clock_ghz * 1e9 * min(u.count, cores or u.count) for u, peak in units)

    def is_bit_exact(self, precision: str, operator_kind: str) -> bool:
        """Whether what computes an operator in a precision gives the contract's bits; else it is within a stated bound.

        Raises:
            PrecisionError, TargetSpecError: as :meth:`unit_for`.
        """
        return self.unit_for(precision, operator_kind).bit_exact

    def conversion_elements_per_cycle(self, source: str, destination: str) -> float:
        """Elements per cycle that one core converts between two stored formats (``uint8``, ``float32``…).

        Raises:
            TargetSpecError: the spec has no such conversion.
        """
        return self._known_conversion(source, destination).elements_per_cycle

    def conversion_peak_per_cycle(self, source: str, destination: str) -> float:
        """What no kernel exceeds of that.

        Raises:
            TargetSpecError: the spec has no such conversion.
        """
        return self._known_conversion(source, destination).peak

    def _known_conversion(self, source: str, destination: str) -> Conversion:
        conversion = self._conversion(source, destination)
        if conversion is None:
            raise TargetSpecError(
                f"target spec {self.name}: no entry of conversions covers {source} → {destination}; add one, "
                f"the formats are {', '.join(STORED_FORMATS)}"
            )
        return conversion

    def keeps_float(self, operator_kind: str, layer_name: str | None = None) -> bool:
        """Whether ``rules.keep_float`` names the operator kind or the layer."""
        return self._keep_float_pattern(operator_kind, layer_name) is not None

    @property
    def processor(self) -> Processor:
        """What kernels' models of tiles know of the hardware; what the spec leaves out is :class:`Processor`'s default.

        A cache that the hardware does not have is that in front of it; without any size, caches are not known.
        """
        memory, cores = self.memory, max(unit.count for unit in self.units)
        measured = {name: value for name in _MEASURED if (value := getattr(memory, name)) is not None}
        sizes = [2**10 * size for size in (memory.l1_data_kib, memory.l2_kib, memory.l3_kib)]
        if not any(sizes):
            return Processor(cores=cores, **measured)
        first = sizes[0] or Processor.l1_bytes
        sets = Processor.l1_sets if memory.l1_data_ways is None else max(1, first // CACHE_LINE // memory.l1_data_ways)
        second = sizes[1] or first
        return Processor(first, sets, second, sizes[2] or second, cores, **measured)

    def cpu_features_needed(self) -> frozenset[str]:
        """Every CPU feature, in Linux's spelling, that the spec, its units or its instruction sets need."""
        return frozenset(self.required_cpu_features).union(
            *(unit.required_features for unit in self.units),
            *(load_instruction_set(name).cpu_features for name in self.instruction_sets),
        )

    def missing_features(self, cpu_flags: Set[str]) -> frozenset[str]:
        """What a CPU with ``cpu_flags`` (any spelling) lacks to run what is compiled for this spec."""
        return self.cpu_features_needed() - normalize_features(cpu_flags)

    def host_problems(self) -> tuple[str, ...]:
        """Why this machine cannot run what is compiled for this spec; empty if it can."""
        return host_problems(self.tvm_target(), self.cpu_features_needed())

    def is_host_compatible(self) -> bool:
        """Whether this machine can run what is compiled for this spec."""
        return not self.host_problems()

    def is_timed_here(self) -> bool:
        """Whether times of this machine are times of the hardware: it can run the kernels, and they are those of its kind.

        What is compiled for an accelerator or a microcontroller may run here, by kernels that stand for its own.
        """
        return self.is_host_compatible() and load_instruction_set(self.instruction_sets[0]).host is not None

    def tvm_target(self) -> Any:
        """The ``tvm.target.Target``.

        Raises:
            TargetSpecError: TVM or its LLVM does not know the target, or the instruction sets do not fit it or the units.
        """
        inexact = [name for name in self.instruction_sets if not load_instruction_set(name).is_bit_exact]
        if inexact and all(unit.bit_exact for unit in self.units):
            raise TargetSpecError(
                f"target spec {self.name}, units: the kernels of {', '.join(inexact)} are within a bound, not bit-exact; say "
                "bit_exact = false in the unit that they compute with, or set bit_exact = true in rules to leave them out"
            )
        return build_target(self.name, self.target.options(), self.instruction_sets)

    def spec_hash(self) -> str:
        """SHA-256 (hexadecimal) of everything but the description and what a detection measures anew each time.

        The order of fields and comments in the file have no part in it; the order of lists and precisions, which says
        what comes first, has. Left out as measured: clocks, vector pipes and memory bandwidth.
        """
        content = self.model_dump(mode="json", by_alias=True)
        del content["description"], content["memory"]["bandwidth_gb_per_s"]
        for unit in content["units"]:
            del unit["clock_ghz"], unit["vector_pipes"]
            unit["macs_per_cycle"] = list(unit["macs_per_cycle"].items())
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def at_clocks(self, clocks_ghz: Mapping[str, float]) -> TargetSpec:
        """The spec with the clocks of some units, by name, in place of its own: a detection measures them anew each time."""
        units = tuple(u.model_copy(update={"clock_ghz": clocks_ghz.get(u.name, u.clock_ghz)}) for u in self.units)
        return self.model_copy(update={"units": units})

    def bit_exact_part(self) -> TargetSpec:
        """What is left of the spec without units and instruction sets that are not bit-exact.

        Raises:
            pydantic.ValidationError: too little is left.
        """
        sets = tuple(name for name in self.instruction_sets if load_instruction_set(name).is_bit_exact)
        units = tuple(unit for unit in self.units if unit.bit_exact)
        left = self.model_copy(update={"instruction_sets": sets, "units": units})
        return TargetSpec.model_validate_json(left.model_dump_json(by_alias=True))

    def to_toml(self) -> str:
        """The spec as the text of a TOML file; reading it gives an equal spec."""
        return toml_text(self.model_dump(mode="json", by_alias=True, exclude_defaults=True))

    def _keep_float_pattern(self, operator_kind: str, layer_name: str | None) -> str | None:
        for pattern in self.rules.keep_float:
            if fnmatchcase(operator_kind, pattern) or (layer_name is not None and fnmatchcase(layer_name, pattern)):
                return pattern
        return None

    def _units_for(
        self, precision: Precision, operator_kind: str, peaks: bool = False
    ) -> tuple[tuple[Unit, float], ...]:
        """Units that offer the precision, or one that is the same to this operator, each with its best rate, or its peak."""
        if precision.weight_points > 1 and precision != A16W16:
            # One pass of the kernel for each point, at the rate of the widest, or of 8 bits where the unit knows no other.
            for bits in (precision.point_bits, 8):
                one = parse_precision(f"a{precision.activation_bits}w{bits}")
                if units := self._units_for(one, operator_kind, peaks):
                    return tuple((unit, rate / precision.weight_points) for unit, rate in units)
            return ()
        found: list[tuple[Unit, float]] = []
        for unit in self.units:
            if unit.serves(operator_kind):
                rates = [
                    rate
                    for name, rate in (unit.peaks if peaks else unit.macs_per_cycle).items()
                    if _equivalent(parse_precision(name), operator_kind) == precision
                ]
                if rates:
                    found.append((unit, max(rates) * unit.vector_pipes))
        return tuple(found)

    def _fastest(self, precision: str, operator_kind: str) -> tuple[Unit, float]:
        reason = self.reason_against(precision, operator_kind)
        if reason is not None:
            raise PrecisionError(f"{precision} for {operator_kind}: {reason}")
        units = self._units_for(_equivalent(parse_precision(precision), operator_kind), operator_kind)
        return max(units, key=lambda found: found[1] * found[0].clock_ghz * found[0].count)

    def _conversion(self, source: str, destination: str) -> Conversion | None:
        for entry in self.conversions:
            if fnmatchcase(source, entry.source) and fnmatchcase(destination, entry.destination):
                return entry
        return None

    def _stored_formats(self) -> tuple[str, ...]:
        offered = {parse_precision(name) for unit in self.units for name in unit.precisions}
        return tuple(dict.fromkeys(_stored_format(precision) for precision in offered))

    @staticmethod
    def _check_operator_kind(operator_kind: str) -> None:
        if operator_kind not in OPERATOR_KINDS:
            raise TargetSpecError(f"unknown operator {operator_kind!r}; the operators are {', '.join(OPERATOR_KINDS)}")


def _equivalent(precision: Precision, operator_kind: str) -> Precision:
    """In whose kernels the precision is computed; for operators without weights, the plainest one with the same activations."""
    precision = precision.computed.carrier
    if operator_kind in OPERATORS_WITH_WEIGHTS:
        return precision
    if precision.arithmetic is Arithmetic.WEIGHT_ONLY:
        return parse_precision("float32")
    if precision.is_integer and not precision.symmetric:
        return parse_precision("a16w8" if precision.activation_bits > 8 else "a8w8")
    return precision


def _stored_format(precision: Precision) -> str:
    if precision.is_integer:
        return "int8" if precision.symmetric else "uint16" if precision.activation_bits > 8 else "uint8"
    return precision.name if precision.arithmetic is Arithmetic.FLOAT else "float32"
