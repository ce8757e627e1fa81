"""Recipes: a training run as a YAML file, checked before anything heavy is imported.

sections: what a recipe may say. recipe: all of it, checked together. reading: its file. binding:
plain values into dataclasses. training: the Trainer's own fields. table: every key for people.
"""

from memlm.train.recipe.reading import override, parse_yaml, read_yaml, shipped_recipes
from memlm.train.recipe.recipe import Recipe
from memlm.train.recipe.sections import (
    CurriculumSection,
    DataSection,
    EvalSection,
    ModelSection,
    TokenizerSection,
)
from memlm.train.recipe.training import training_fields

__all__ = [
    "CurriculumSection",
    "DataSection",
    "EvalSection",
    "ModelSection",
    "Recipe",
    "TokenizerSection",
    "override",
    "parse_yaml",
    "read_yaml",
    "shipped_recipes",
    "training_fields",
]
