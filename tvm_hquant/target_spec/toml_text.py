"""Writes plain data as TOML 1.0 text (https://toml.io/en/v1.0.0); the standard library only reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml_text(content: Mapping[str, Any]) -> str:
    """A TOML document for nested mappings and lists of strings, booleans and finite numbers.

    Lists of mappings become arrays of tables; the values of a table come before its sub-tables, as TOML demands.
    """
    return "\n".join(_table((), content)).lstrip("\n") + "\n"


def toml_string(text: str) -> str:
    """A TOML basic string. JSON's escapes are a subset of TOML's, but TOML wants DEL escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _table(path: tuple[str, ...], content: Mapping[str, Any]) -> list[str]:
    values = {key: value for key, value in content.items() if not _is_table(value) and not _is_table_list(value)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in values.items()]
    for key, value in content.items():
        name = ".".join(map(_key, (*path, key)))
        if _is_table(value):
            lines += ["", f"[{name}]", *_table((*path, key), value)]
        elif _is_table_list(value):
            for element in value:
                lines += ["", f"[[{name}]]", *_table((*path, key), element)]
    return lines


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_table, value))


def _key(key: str) -> str:
    bare = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return key if bare else toml_string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return toml_string(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"TOML has no form here for {type(value).__name__}")
