"""`memlm train`: a memory model from a recipe, or from a base model and data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.cli.options import Commands, let_options_interrupt
from memlm.cli.printing import print_written

if TYPE_CHECKING:
    from memlm.train import Recipe
    from memlm.train.outlook import Outlook


def add_to(commands: Commands) -> None:
    """Add `memlm train`."""
    train = commands.add("train", "train a memory model from a recipe, or on your own data", run)
    train.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE key=value",
        help="a YAML file, or the name of a recipe shipped with memlm (none is needed with --base and "
        "--data), and recipe keys to change",
    )
    let_options_interrupt(train, "words", str)
    train.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or hub id of the model to give a memory; a model that has one, in a folder or shipped "
        "(qa1), is trained on with its own",
    )
    train.add_argument("--memory", help="its memory, by name (default: armt, or the recipe's own)")
    train.add_argument(
        "--data",
        help="documents with questions, chats, prompts with completions, or texts: a file or folder of "
        ".jsonl, .parquet or text, or a hub id",
    )
    train.add_argument(
        "--eval-data",
        metavar="DATA",
        help="held-out data, named as --data: evaluated ten times on the way, unless "
        "training.eval_strategy and eval_steps say otherwise",
    )
    train.add_argument("--out", type=Path, help="folder of the run (default: the recipe's own)")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, with what a trial of three batches costs, and stop",
    )
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
    recipe = make_recipe(arguments)
    from memlm.train import plan, train
    from memlm.train.callbacks import held_out

    if arguments.dry_run:
        # Nothing is written, so a folder need not be named.
        print_outlook(plan(recipe, arguments.out or recipe.output_dir or "out"))
        return
    result = train(
        recipe,
        arguments.out,
        resume=False if arguments.no_resume else "auto",
        on_outlook=print_outlook,
    )
    if not result.finished:
        raise KeyboardInterrupt
    accuracy = "" if result.accuracy is None else f", {result.accuracy:.0%} of answers right"
    loss = "" if result.loss is None else f", loss {result.loss:.3f}"
    print(f"{result.steps} steps in {result.seconds:.0f} s{loss}{accuracy}")
    if result.eval_loss is not None:
        print(held_out(result.eval_loss, result.eval_accuracy))
    print_written(result.files)


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that was named, or the one that --base and --data stand for."""
    from memlm.pretrained import holds_memory
    from memlm.train import Recipe
    from memlm.train.recipe.own import start

    words = arguments.words
    named = bool(words) and ("=" not in words[0] or Path(words[0]).is_file())
    overrides = words[1:] if named else words
    if not named and (arguments.base is None or arguments.data is None):
        missing = "a RECIPE, or --base and --data" if arguments.base is None else "--data"
        raise ValueError(f"nothing says what to train; give {missing}")
    if arguments.eval_data is not None:
        path = f"data.eval_path={json.dumps(arguments.eval_data)}"
        overrides = [path, "training.eval_strategy=steps", "training.eval_steps=0.1", *overrides]
    if not named:
        return Recipe.for_data(arguments.base, arguments.data, arguments.memory, overrides)
    # As JSON, which is YAML: a name is text whatever it looks like.
    keys = {"model.base": arguments.base, "model.memory": arguments.memory}
    if arguments.base is not None and holds_memory(arguments.base):
        given = start(arguments.base, arguments.memory)
        keys = {f"model.{key}": value for key, value in given.items()}
        overrides = ["model.base=null", *overrides]
    if arguments.data is not None:
        keys |= {"data.source": "rows", "data.path": arguments.data}
    named_keys = [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]
    return Recipe.load(words[0], [*named_keys, *overrides])


def print_outlook(outlook: Outlook) -> None:
    """The plan of a run, before it starts."""
    for line in outlook.lines():
        print(line, flush=True)
