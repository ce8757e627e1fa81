"""Checks of what a caller gives an index: texts, ids, metadata and filters, each in the form it is kept in.

Errors name the argument and the place in it, so that nothing is added when one entry is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Value = str | int | float | bool | None


class Absent:
    """In a filter: chunks whose metadata does not have the key."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = Absent()
ChunkEntry = tuple[str, str, str]  # id as JSON, text, metadata as JSON ("" for none)


def check_texts(texts: Sequence[str], name: str) -> list[str]:
    """The texts as a list. ValueError unless every one is non-blank text that UTF-8 can hold."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"{name} is one {type(texts).__name__}; give a list of texts")
    checked = _as_list(texts, name)
    for position, text in enumerate(checked):
        _check_text(text, f"{name}[{position}]")
        if not text.strip():
            raise ValueError(f"{name}[{position}]={text!r} is empty; leave empty texts out")
    return checked


def _as_list(values: Any, name: str) -> list[Any]:
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(f"{name} is of type {type(values).__name__}; give a list") from error


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is of type {type(text).__name__}; give str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate at character {error.start}, which UTF-8 cannot hold; "
            "clean it with text.encode('utf-8', 'replace').decode('utf-8')"
        ) from error


def check_id(value: Any, name: str) -> str:
    """An id as the JSON text it is stored under: 7 and "7" are two ids."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; give str or int")
    _check_text(value, name)
    if not value:
        raise ValueError(f"{name}='' is empty; give text, or ids=None to have ids made")
    return json.dumps(str(value), ensure_ascii=False)


def id_of(key: str) -> str | int:
    """The id as it was given."""
    return json.loads(key)


def check_ids(ids: Sequence[str | int], name: str = "ids") -> list[str]:
    """Ids as JSON texts, in order. ValueError when one is given twice."""
    if isinstance(ids, (str, bytes)):
        raise ValueError(f"{name}={ids!r} is one id; give a list of ids")
    checked = [check_id(value, f"{name}[{n}]") for n, value in enumerate(_as_list(ids, name))]
    first: dict[str, int] = {}
    for position, value in enumerate(checked):
        if value in first:
            raise ValueError(
                f"{name}[{position}]={id_of(value)!r} was given before at {first[value]}; "
                "ids must be unique"
            )
        first[value] = position
    return checked


def check_metadata(metadata: Sequence[Mapping[str, Value]] | None, count: int) -> list[str]:
    """One JSON text per chunk ("" for none). ValueError unless `count` flat mappings of plain values."""
    if metadata is None:
        return [""] * count
    if isinstance(metadata, (Mapping, str, bytes)):
        raise ValueError("metadata must be a list, one mapping per text; wrap it in a list")
    given = _as_list(metadata, "metadata")
    if len(given) != count:
        raise ValueError(f"metadata has {len(given)} entries for {count} texts; give one per text")
    return [_metadata_json(entry, f"metadata[{n}]") for n, entry in enumerate(given)]


def _metadata_json(entry: Any, name: str) -> str:
    if entry is None:
        return ""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} is of type {type(entry).__name__}; give a mapping or None")
    plain = {}
    for key, value in entry.items():
        _check_text(key, f"a key of {name}, {key!r},")
        plain[str(key)] = _plain_value(value, f"{name}[{key!r}]")
    return json.dumps(plain, ensure_ascii=False) if plain else ""


def _plain_value(value: Any, name: str) -> Value:
    """`value` as one of the five kinds JSON returns unchanged."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_text(value, name)
        return str(value)
    if isinstance(value, int):
        if value.bit_length() > 10_000:
            raise ValueError(f"{name} has {value.bit_length()} bits; give at most 10,000, or text")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value!r} is not finite; give a number, text or None")
        return float(value)
    raise ValueError(
        f"{name} is of type {type(value).__name__}; give str, int, float, bool or None"
    )


def check_where(where: Mapping[str, Any] | None) -> dict[str, list[Value | Absent]]:
    """A filter as key -> values allowed; {} allows every chunk."""
    if where is None:
        return {}
    if not isinstance(where, Mapping):
        raise ValueError(f"where is of type {type(where).__name__}; give a mapping key -> value")
    checked = {}
    for key, value in where.items():
        _check_text(key, f"a key of where, {key!r},")
        several = isinstance(value, (list, tuple, set, frozenset))
        values = list(value) if several else [value]
        checked[str(key)] = [
            v if v is ABSENT else _plain_value(v, f"where[{key!r}]") for v in values
        ]
    return checked
