"""The training section: fields of MemLMTrainingArguments, read from sources and not imported.

Importing them would load transformers and torch, which takes seconds; a mistyped key is reported at once.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from memlm.train.recipe.binding import bind, did_you_mean

OWN_ARGUMENTS = Path(__file__).parent.parent / "trainer" / "arguments.py"
# Set from other sections of the recipe.
NOT_IN_TRAINING = {"output_dir": "output_dir", "seed": "seed", "data_seed": "seed"}
SIMPLE_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "None": type(None)}


def check_training(values: dict[str, Any]) -> None:
    """Refuse unknown or mistyped fields of the training section. ValueError names the key."""
    known = training_fields()
    for key, value in values.items():
        if key in NOT_IN_TRAINING:
            raise ValueError(
                f"training.{key} belongs to the top; write {NOT_IN_TRAINING[key]}: there"
            )
        if key not in known:
            raise ValueError(
                f"training.{key} is not a field of MemLMTrainingArguments; {did_you_mean(key, list(known))}"
            )
        kinds = [part.strip() for part in known[key].split("|")]
        if all(kind in SIMPLE_TYPES for kind in kinds):
            hint: Any = SIMPLE_TYPES[kinds[0]]
            for kind in kinds[1:]:
                hint = hint | SIMPLE_TYPES[kind]
            bind(hint, value, f"training.{key}")


@cache
def training_fields() -> dict[str, str]:
    """Fields of MemLMTrainingArguments and their types, read from the sources without importing."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(next(iter(spec.submodule_search_locations))) / "training_args.py"
    return {**field_types(source, "TrainingArguments"), **own_training_fields()}


@cache
def own_training_fields() -> dict[str, str]:
    """Fields that MemLMTrainingArguments adds, and their types."""
    return field_types(OWN_ARGUMENTS, "MemLMTrainingArguments")


@cache
def own_training_help() -> dict[str, tuple[str, str, str]]:
    """Type, default and meaning of what MemLMTrainingArguments adds."""
    found = {}
    for statement in class_body(OWN_ARGUMENTS, "MemLMTrainingArguments"):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.value, ast.Call):
            said = {k.arg: ast.literal_eval(k.value) for k in statement.value.keywords}
            name, kind = ast.unparse(statement.target), ast.unparse(statement.annotation)
            found[name] = (kind, repr(said["default"]), said["metadata"]["help"])
    return found


def field_types(source: Path, name: str) -> dict[str, str]:
    """The annotated fields of class `name` in a source file, and their types as written there."""
    return {
        statement.target.id: ast.unparse(statement.annotation)
        for statement in class_body(source, name)
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    }


def class_body(source: Path, name: str) -> list[ast.stmt]:
    """The statements of class `name` in a source file."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name).body
