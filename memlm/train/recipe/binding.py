"""Plain values, as YAML has them, into dataclasses and back, with errors that name the key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def bind(cls: type, values: Any, where: str) -> Any:
    """`cls` from plain values. ValueError on an unknown key, with the nearest, or a wrong type."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{where or 'recipe'}={values!r} should be a mapping; write its keys below it, indented"
        )
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    given = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ValueError(f"{name} is no key of a recipe; {did_you_mean(str(key), known)}")
        given[key] = convert(hints[key], value, name)
    for item in fields(cls):
        missing = item.default is MISSING and item.default_factory is MISSING
        if missing and item.name not in given:
            raise ValueError(
                f"{where}.{item.name} is missing; give a {type_name(hints[item.name])}"
            )
    try:
        return cls(**given)
    except ValueError as error:
        # A check between fields: say which section's.
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`. ValueError naming key, value and what is expected."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return bind(hint, value, name)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return convert(option, value, name)
            except ValueError:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            several = len(args) == 2 and args[1] is Ellipsis
            if several or len(value) == len(args):
                inner = [args[0]] * len(value) if several else list(args)
                pairs = enumerate(zip(inner, value, strict=True))
                return tuple(convert(kind, item, f"{name}.{i}") for i, (kind, item) in pairs)
    elif hint is bool or origin is dict or origin is list:
        if isinstance(value, origin or hint):
            if origin is dict and args[1] is not Any:
                return {key: convert(args[1], item, f"{name}.{key}") for key, item in value.items()}
            return value
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and not isinstance(value, bool):
        return value
    raise ValueError(f"{name}={value!r} should be {type_name(hint)}; write {example(hint)}")


def did_you_mean(key: str, known: Sequence[str]) -> str:
    """A hint at the known key that is most like `key`."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"


def type_name(hint: Any) -> str:
    """A type as a reader would say it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in args)
    if origin is Literal:
        return " or ".join(repr(option) for option in args)
    if origin in (tuple, list):
        return f"list of {type_name(args[0])}"
    if origin is dict or is_dataclass(hint):
        return "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "value"}
    return "null" if hint is type(None) else names.get(hint, str(hint))


def example(hint: Any) -> str:
    """A value of a type, as YAML has it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return example(args[0])
    if origin is Literal:
        return str(args[0])
    if origin in (tuple, list):
        return f"[{example(args[0])}]"
    if origin is dict or is_dataclass(hint):
        return "{key: value}"
    return {int: "8", float: "0.1", str: "text", bool: "true"}.get(hint, "null")


def plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, dict):
            found |= dotted(value, f"{name}.")
        else:
            found[name] = value
    return found
