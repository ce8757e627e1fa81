"""`memlm train`: a memory model from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memlm.cli.options import Commands, let_options_interrupt
from memlm.cli.printing import print_written


def add_to(commands: Commands) -> None:
    """Add `memlm train`."""
    train = commands.add("train", "train a memory model from a recipe", run)
    train.add_argument("recipe", help="a YAML file, or the name of a recipe shipped with memlm")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    let_options_interrupt(train, "overrides", str)
    train.add_argument("--out", type=Path, help="folder of the run (default: the recipe's own)")
    train.add_argument(
        "--no-resume",
        action="store_true",
        help="start over in a folder that holds a run, instead of going on with it",
    )
    train.add_argument(
        "--keys", action=PrintKeys, nargs=0, help="print every key of a recipe and exit"
    )


class PrintKeys(argparse.Action):
    """Prints the keys of a recipe, whatever else is given, as --help does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from memlm.train import Recipe

        print(Recipe.describe())
        parser.exit()


def run(arguments: argparse.Namespace) -> None:
    """Train, and say how it went. KeyboardInterrupt when it was stopped early."""
    from memlm.train import Recipe, train

    recipe = Recipe.load(arguments.recipe, overrides=arguments.overrides)
    result = train(recipe, arguments.out, resume=False if arguments.no_resume else "auto")
    if not result.finished:
        raise KeyboardInterrupt
    accuracy = "" if result.accuracy is None else f", {result.accuracy:.0%} of answers right"
    loss = "" if result.loss is None else f", loss {result.loss:.3f}"
    print(f"{result.steps} steps in {result.seconds:.0f} s{loss}{accuracy}")
    print_written(result.files)
