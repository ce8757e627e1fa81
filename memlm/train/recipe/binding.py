"""Plain values, as YAML has them, into dataclasses and back, with errors that name the key.

pydantic checks types, choices and ranges; the sentences a reader gets are written here.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

adapter = cache(TypeAdapter)


def bind(hint: Any, values: Any, where: str) -> Any:
    """`values` as the type `hint`, mostly a dataclass; `where` is their key, "" for a whole recipe.

    ValueError names the first key that is wrong, its value and what to write: unknown keys before
    others, with the nearest known one.
    """
    # As JSON, in which lists may become tuples and mappings dataclasses, and nothing else changes its type.
    text = json.dumps(values, default=refuse_object)
    try:
        return adapter(hint).validate_json(text, strict=True, extra="forbid")
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    # A misspelt key is also missing under its right name, so unknown keys come first.
    error = min(errors, key=lambda error: error["type"] != "unexpected_keyword_argument")
    inner, place = within(hint, error["loc"])
    name = ".".join(map(str, ([where] if where else []) + place))
    value, kind = error["input"], error["type"]
    if kind == "unexpected_keyword_argument":
        known = list(get_type_hints(inner))
        raise ValueError(
            f"{name} is not a key of a recipe; {did_you_mean(str(error['loc'][-1]), known)}"
        )
    if kind == "missing":
        raise ValueError(f"{name} is missing; give a {type_name(inner)}")
    if kind == "value_error":
        # A check between fields: name its section.
        cause = error["ctx"]["error"]
        raise ValueError(f"{name}: {cause}" if name else str(cause)) from cause
    if is_dataclass(inner):
        raise ValueError(
            f"{name or 'recipe'}={value!r} should be a mapping; write its keys below it, indented"
        )
    if kind == "literal_error" or kind.endswith("_type"):
        raise ValueError(f"{name}={value!r} should be {type_name(inner)}; write {example(inner)}")
    # Beyond a limit: pydantic names the limit, which is the remedy.
    raise ValueError(f"{name}={value!r}: {error['msg']}")


def refuse_object(value: Any) -> Any:
    """ValueError for what JSON has no word for, such as a date."""
    raise ValueError(
        f"{value!r} is a {type(value).__name__}, and a recipe holds plain values alone; write it as "
        "text, in quotes"
    )


def within(hint: Any, location: Sequence[str | int]) -> tuple[Any, list[str | int]]:
    """The type at pydantic's `location` in `hint`, and the keys that lead there.

    Where the last key is unknown, the type of the dataclass it was looked for in. For a choice between
    types, the choice itself: after its key, pydantic's location names the type it tried.
    """
    place: list[str | int] = []
    for key in location:
        origin, args = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            break
        place.append(key)
        if is_dataclass(hint):
            hint = get_type_hints(hint).get(str(key), hint)
        elif origin is dict:
            hint = args[1]
        else:
            hint = args[0 if origin is list or args[-1] is Ellipsis else int(key)]
    return hint, place


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
        return f"[{', '.join(example(kind) for kind in args if kind is not Ellipsis)}]"
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
