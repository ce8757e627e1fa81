"""Every key of a recipe as a table for people: type, meaning, default."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from memlm.train.recipe.binding import type_name
from memlm.train.recipe.training import own_training_help


def describe_keys(recipe: type) -> str:
    """Every key of the dataclass `recipe` with its type, meaning and default, one per line."""
    rows = key_rows(recipe, "")
    rows += [(f"training.{name}", *about) for name, about in own_training_help().items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(
        f"{key:<{widths[0]}}  {kind:<{widths[1]}}  {meaning}" + (f" [{default}]" if default else "")
        for key, kind, default, meaning in rows
    )


def key_rows(cls: Any, prefix: str) -> list[tuple[str, str, str, str]]:
    """Key, type, default and meaning of the fields of `cls`, those of its sections included."""
    rows: list[tuple[str, str, str, str]] = []
    for item in fields(cls):
        hint = get_type_hints(cls)[item.name]
        key = f"{prefix}{item.name}"
        if is_dataclass(hint):
            rows += key_rows(hint, f"{key}.")
            continue
        default = "" if item.default is MISSING else repr(item.default)
        if get_args(hint) and is_dataclass(get_args(hint)[0]):
            rows += key_rows(get_args(hint)[0], f"{key}.N.")
            continue
        rows.append((key, type_name(hint), default, item.metadata.get("help", "")))
    return rows
