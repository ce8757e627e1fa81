"""A recipe's file: where it is, its YAML, and keys changed on the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memlm.files import parse_yaml

SHIPPED = Path(__file__).parent.parent.parent / "recipes"


def find_recipe(path: str | os.PathLike[str]) -> Path:
    """A recipe's file: a path, or the name of a shipped recipe."""
    given = Path(path)
    if given.is_file():
        return given
    shipped = shipped_recipes()
    name = given.as_posix().removesuffix(".yaml")
    if name in shipped:
        return shipped[name]
    raise FileNotFoundError(
        f"recipe {os.fspath(path)!r} does not exist; give a YAML file, or one of "
        f"{', '.join(shipped)}"
    )


def shipped_recipes() -> dict[str, Path]:
    """The recipes shipped with memlm, by name. Those beside shipped weights record how these were made."""
    places = (path.relative_to(SHIPPED) for path in sorted(SHIPPED.rglob("*.yaml")))
    return {
        place.with_suffix("").as_posix(): SHIPPED / place
        for place in places
        if place.parts[0] != "weights"
    }


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. ValueError names the line that cannot be read."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"recipe {str(path)!r} is not readable YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"recipe {str(path)!r} holds no mapping; write 'model:', 'data:' and so on"
        )
    return values


def override(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values` with "section.key=value" put in; list entries go by number."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(
                f"override {text!r} has no 'key=value'; write training.learning_rate=1e-3"
            )
        parts = key.strip().split(".")
        place: Any = values
        for part in parts[:-1]:
            if isinstance(place, list) and part.isdigit() and int(part) < len(place):
                place = place[int(part)]
            elif isinstance(place, dict):
                given = place.get(part)
                if not isinstance(given, (dict, list)):
                    # Of a memory given by its name alone, the name stays.
                    named = part == "memory" and isinstance(given, str)
                    place[part] = {"name": given} if named else {}
                place = place[part]
            else:
                raise ValueError(f"override {text!r}: {part!r} is in no section; check the key")
        if isinstance(place, list):
            if not parts[-1].isdigit() or int(parts[-1]) >= len(place):
                raise ValueError(
                    f"override {text!r}: the list has entries 0 to {len(place) - 1}; use one of "
                    "them"
                )
            place[int(parts[-1])] = parse_yaml(value)
        else:
            place[parts[-1]] = parse_yaml(value)
    return values
