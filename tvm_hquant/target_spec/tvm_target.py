"""From a spec's target table to TVM: builds the target, and says what keeps this machine from running it.

TVM accepts any text for mcpu, mattr and mtriple; LLVM then warns on standard error and compiles for something else, or
crashes. So the names are checked here first.
"""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from tvm_hquant.cpu_features import cpu_features, normalize_features
from tvm_hquant.errors import TargetSpecError
from tvm_hquant.kernels.instruction_set import InstructionSet, load_instruction_set, load_instruction_sets

_OTHER_ARCHITECTURE_NAMES = re.compile(r"amd64|x86|i[456]86|arm64|armv\w+|thumbv\w+|riscv64gc")
"""Spellings that LLVM's triple parser takes beside the names of its targets."""


def build_target(name: str, options: Mapping[str, Any], instruction_sets: Sequence[str]) -> Any:
    """The ``tvm.target.Target`` for the options of spec ``name``.

    Raises:
        TargetSpecError: unknown tag, architecture, CPU or feature, or instruction sets that do not fit the target.
    """
    from tvm.target import Target  # here, so that reading and listing specs does not wait for TVM

    _check_tag(name, options)
    for table, part in (("target", options), ("target.host", options.get("host", {}))):
        _check_llvm_names(f"target spec {name}, {table}", part)
    try:
        target = Target(dict(options))
    except (ValueError, TypeError) as error:
        raise TargetSpecError(f"target spec {name}, target: TVM refuses {dict(options)}: {error}") from error
    kind = str(target.kind.name)
    named = [load_instruction_set(name) for name in instruction_sets]
    unfit = [found.name for found in named if found.target_kind != kind]
    if unfit:
        fit = [found.name for found in load_instruction_sets() if found.target_kind == kind]
        advice = f"use some of {', '.join(fit)}" if fit else "leave it to specs of another kind of target"
        raise TargetSpecError(
            f"target spec {name}, instruction_sets: {', '.join(unfit)} does not fit a target of kind {kind}; {advice}"
        )
    if kind == "llvm":
        _check_features(name, target, named)
    elif kind == "cuda":
        _check_gpu(name, str(target.attrs["arch"]), named)
    return target


def host_problems(target: Any, needed_features: Set[str]) -> tuple[str, ...]:
    """Why this machine cannot run code for a target that needs some CPU features; empty if it can.

    Raises:
        TargetSpecError: features are needed, but this machine's cannot be read.
    """
    if target.kind.name == "cuda":
        return _gpu_problems(target)
    problems = _machine_problems(target)
    if problems or not needed_features:
        return problems
    missing = sorted(needed_features - cpu_features())
    return (f"this CPU lacks {', '.join(missing)}",) if missing else ()


def _check_tag(name: str, options: Mapping[str, Any]) -> None:
    from tvm.target import list_tags

    tag = options.get("tag")
    known = list_tags()
    if tag is not None and known is not None and tag not in known:
        raise TargetSpecError(
            f"target spec {name}, target.tag: TVM knows no target {tag!r}{_similar(tag, known)}; "
            "tvm.target.list_tags() gives all, or write kind and its options instead of a tag"
        )


def _check_llvm_names(where: str, options: Mapping[str, Any]) -> None:
    if options.get("kind") != "llvm":
        return
    from tvm.target import Target, codegen

    triple = options.get("mtriple")
    if triple is not None:
        architecture = triple.split("-")[0]
        known = [str(target) for target in codegen.llvm_get_targets()]
        if architecture not in known and not _OTHER_ARCHITECTURE_NAMES.fullmatch(architecture):
            raise TargetSpecError(
                f"{where}.mtriple: {triple!r} starts with no architecture of this LLVM"
                f"{_similar(architecture, known)}; write for example x86_64-linux-gnu or aarch64-linux-gnu"
            )
    plain = Target({key: options[key] for key in ("kind", "mtriple") if key in options})
    cpu = options.get("mcpu")
    if cpu is not None and cpu not in (cpus := [str(c) for c in codegen.llvm_get_cpu_archlist(plain)]):
        raise TargetSpecError(
            f"{where}.mcpu: LLVM knows no CPU {cpu!r} for {triple or 'this machine'}{_similar(cpu, cpus)}; "
            f"'llc -mtriple={triple or '…'} -mcpu=help' lists the {len(cpus)} that it knows"
        )
    for attribute in options.get("mattr", []):
        # LLVM lists a feature once it is switched on; one that it does not know stays absent.
        feature = attribute[1:]
        probe = Target(
            {**{k: options[k] for k in ("kind", "mtriple", "mcpu") if k in options}, "mattr": [f"+{feature}"]}
        )
        if feature not in {str(f) for f in codegen.llvm_get_cpu_features(probe)}:
            raise TargetSpecError(
                f"{where}.mattr: LLVM knows no feature {feature!r} for {triple or 'this machine'}; "
                "'llc -march=… -mattr=help' lists them"
            )


def _check_features(name: str, target: Any, instruction_sets: Sequence[InstructionSet]) -> None:
    from tvm.target import codegen

    enabled = normalize_features(str(feature) for feature in codegen.llvm_get_cpu_features(target))
    for found in instruction_sets:
        lacking = sorted(found.cpu_features - enabled)
        if lacking:
            raise TargetSpecError(
                f"target spec {name}, instruction_sets: the kernels of {found.name} need {', '.join(lacking)}, which the "
                "target does not switch on; name a CPU that has it in target.mcpu, add it to target.mattr (as LLVM "
                f"spells it), or drop {found.name}"
            )


def _check_gpu(name: str, arch: str, instruction_sets: Sequence[InstructionSet]) -> None:
    number = int(re.sub(r"\D", "", arch))
    for found in instruction_sets:
        if number < found.first_gpu:
            raise TargetSpecError(
                f"target spec {name}, instruction_sets: the kernels of {found.name} need a GPU of sm_{found.first_gpu} or "
                f"later, the target is {arch}; drop {found.name}"
            )


def _machine_problems(target: Any) -> tuple[str, ...]:
    triple = target.attrs.get("mtriple")
    if triple is None:
        return ()
    parts = str(triple).split("-")
    problems = []
    if _architecture(parts[0]) != _architecture(platform.machine()):
        problems.append(f"it is compiled for {parts[0]}, this machine is {platform.machine()}")
    systems = {"linux": "Linux", "darwin": "Darwin", "macosx": "Darwin", "windows": "Windows"}
    named = next((systems[part] for part in parts if part in systems), None)
    if named is not None and named != platform.system():
        problems.append(f"it is compiled for {named}, this machine runs {platform.system()}")
    return tuple(problems)


def _gpu_problems(target: Any) -> tuple[str, ...]:
    import tvm

    if target.host is not None and (problems := _machine_problems(target.host)):
        return problems
    device = tvm.cuda(0)
    if not device.exist:
        return ("TVM finds no CUDA device on this machine",)
    wanted = re.sub(r"\D", "", str(target.attrs["arch"]))
    found = str(device.compute_version).replace(".", "")
    # Machine code for one compute capability runs on later ones of the same major number only.
    if found[:-1] != wanted[:-1] or int(found) < int(wanted):
        return (f"it is compiled for {target.attrs['arch']}, this machine's GPU is sm_{found}",)
    return ()


def _architecture(name: str) -> str:
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name.lower(), name.lower())


def _similar(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
