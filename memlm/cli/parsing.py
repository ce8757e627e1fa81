"""From the typed words to the command to run, with its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from memlm import __version__
from memlm.cli import ask, card, data, demo, effect, evaluate, index, perplexity, reports, train
from memlm.cli.options import Commands

EXAMPLES = """\
examples:
  memlm demo
  memlm train tiny-armt-qa1 --out runs/tiny training.learning_rate=1e-3
  memlm eval runs/tiny --tasks qa1 --lengths 0k 4k 128k --samples 100 --out runs/tiny/eval
  memlm ask runs/tiny book.txt notes.txt -q "Where is Mary?"
  memlm index build library book.txt notes.txt
  memlm ask runs/tiny --index library -q "Where is Mary?"
  memlm data babilong --tasks qa1 qa2 --lengths 4k --samples 100 --out data/mine
"""
# In the order in which --help lists them.
MODULES = (train, evaluate, reports, perplexity, effect, card, ask, index, data, demo)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What was typed; `run` is its command. SystemExit on what cannot be understood, and after --help
    and --keys.
    """
    commands = make_commands()
    arguments, rest = commands.parser.parse_known_args(join_command(argv, commands.parsers))
    list_name = getattr(arguments, "interrupted_list", None)
    if rest and (list_name is None or any(value.startswith("-") for value in rest)):
        commands.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if list_name is not None:
        values = [*getattr(arguments, list_name), *map(arguments.interrupted_type, rest)]
        setattr(arguments, list_name, values)
    return arguments


def make_commands() -> Commands:
    """All commands of `memlm`."""
    parser = argparse.ArgumentParser(
        prog="memlm",
        description="A long memory of constant size for Hugging Face causal language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"memlm {__version__}")
    commands = Commands(parser)
    for module in MODULES:
        module.add_to(commands)
    return commands


def join_command(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Join `eval compare` and the like into one word; argparse would see a command and a model.

    Every command of two words needs at least a folder. So where none follows, and the second word is
    the name of a folder with a model, the model is meant.
    """
    two_words = " ".join(argv[:2])
    if len(argv) < 2 or two_words not in names:
        return list(argv)
    is_model = (Path(argv[1]) / "config.json").is_file()
    if is_model and (len(argv) == 2 or argv[2].startswith("-")):
        return list(argv)
    return [two_words, *argv[2:]]
