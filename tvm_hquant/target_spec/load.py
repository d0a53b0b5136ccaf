"""Finds, reads and validates target specs."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from importlib.metadata import entry_points
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from tvm_hquant.errors import TargetSpecError
from tvm_hquant.target_spec.spec import TargetSpec

HOST = "host"
"""The name under which :func:`load_target_spec` detects this machine."""


ENTRY_POINTS = "tvm_hquant.target_specs"
"""Entry point group in which other distributions name packages with specs of theirs: ``name = "package"``."""


def list_target_specs() -> tuple[str, ...]:
    """Names of the specs that ship with the package, or with another distribution, in alphabetical order."""
    return tuple(_shipped())


def load_target_spec(name_or_path: str | Path) -> TargetSpec:
    """The spec of that name, or in that file (a path, or text that ends in ``.toml``); ``host`` detects this machine.

    Raises:
        TargetSpecError: there is no such spec or file, or it has a wrong field.
    """
    name = str(name_or_path)
    if name == HOST:
        from tvm_hquant.target_spec.detect import detect_host  # it starts from shipped specs, so it imports this module

        return detect_host()
    if isinstance(name_or_path, Path) or name.endswith(".toml") or "/" in name:
        path = Path(name_or_path)
        return read_target_spec(_text(path), str(path))
    shipped = _shipped()
    if name not in shipped:
        close = difflib.get_close_matches(name, shipped, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise TargetSpecError(
            f"no target spec is called {name!r}{guess}; there are {', '.join(shipped)}, {HOST} for this machine, "
            "and any file NAME.toml (docs/target-spec.md says how to write one)"
        )
    return read_target_spec(shipped[name].read_text(encoding="utf-8"), f"{name}.toml")


def read_target_spec(text: str, file: str) -> TargetSpec:
    """The spec in the text of a TOML file; ``file`` is its name for messages.

    Raises:
        TargetSpecError: the text is no TOML, or a field is wrong: all wrong fields are named.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TargetSpecError(f"{file}: not a TOML file: {error}") from error
    return spec_from(content, file)


def spec_from(content: Mapping[str, Any], file: str) -> TargetSpec:
    """The spec with this content; ``file`` is where it came from, for messages.

    Raises:
        TargetSpecError: a field is wrong: all wrong fields are named.
    """
    try:
        # By way of JSON, in which pydantic's strict mode takes arrays for tuples but no text for numbers.
        spec = TargetSpec.model_validate_json(json.dumps(content, default=str))
        return spec.bit_exact_part() if spec.rules.bit_exact else spec
    except ValidationError as error:
        # A list all of whose entries are wrong is reported as too short as well; that says nothing new.
        errors = [e for e in error.errors(include_url=False) if not (e["type"] == "too_short" and e["input"])]
        problems = [_describe(problem) for problem in errors]
        heading = f"{file}: " if len(problems) == 1 else f"{file}: {len(problems)} wrong fields:\n  "
        raise TargetSpecError(heading + "\n  ".join(problems)) from None


@cache
def _shipped() -> Mapping[str, Traversable]:
    """Files of the specs that can be had by name."""
    packages = ["tvm_hquant.target_specs", *sorted({point.value for point in entry_points(group=ENTRY_POINTS)})]
    files: dict[str, Traversable] = {}
    for package in packages:
        for file in resources.files(package).iterdir():
            name = file.name.removesuffix(".toml")
            if name == file.name:
                continue
            if name in files:
                raise TargetSpecError(f"two target specs are called {name}: {files[name]} and {file}; rename one")
            files[name] = file
    return types.MappingProxyType(dict(sorted(files.items())))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TargetSpecError(f"{path}: cannot read the target spec: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TargetSpecError(f"{path}: not a TOML file: not UTF-8 text at byte {error.start}") from error


def _describe(problem: Mapping[str, Any]) -> str:
    location: tuple[str | int, ...] = problem["loc"]
    field = _field_path(location)
    kind = problem["type"]
    if kind == "missing":
        return f"{field}: is missing; docs/target-spec.md says what it means"
    if kind == "extra_forbidden":
        allowed = _fields_at(location[:-1])
        close = difflib.get_close_matches(str(location[-1]), allowed, n=1)
        guess = f" (did you mean {close[0]}?)" if close else ""
        return f"{field}: unknown field{guess}; allowed here are {', '.join(allowed)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should", "should").replace("Tuple should", "the list should")
    if isinstance(problem["input"], (Mapping, Sequence)) and not isinstance(problem["input"], str):
        return f"{field}: {message}"
    return f"{field}: found {json.dumps(problem['input'], ensure_ascii=False)}: {message}"


def _field_path(location: Sequence[str | int]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":  # pydantic's mark for the key of a mapping, whose name comes before it
            path += f".{part}" if path else part
    return path or "the file as a whole"


def _fields_at(location: Sequence[str | int]) -> list[str]:
    """Names, as files spell them, of the fields that the table at ``location`` may have."""
    model: type[BaseModel] = TargetSpec
    for part in location:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            model = _model_within(fields[part].annotation) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_within(annotation: Any) -> type[BaseModel] | None:
    """The table in ``Table``, ``Table | None`` or ``tuple[Table, ...]``."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = map(_model_within, typing.get_args(annotation))
    return next((model for model in found if model is not None), None)
