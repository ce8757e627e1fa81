"""How commands are added, and the options that several of them have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Settings of an evaluation that a recipe may give, with the values used where it does not.
SAMPLE_DEFAULTS: dict[str, Any] = {
    "tasks": ["qa1"],
    "lengths": ["0k", "4k"],
    "samples": 100,
    "haystack": "builtin",
    "batch_size": 8,
}


class Commands:
    """The commands below `parser`. Those of two words, like "eval compare", have a space in their name."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser
        self._shared = argparse.ArgumentParser(add_help=False)
        self._shared.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )
        self._commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    @property
    def parsers(self) -> dict[str, argparse.ArgumentParser]:
        """The parser of each command, by its name."""
        return dict(self._commands.choices)

    def add(
        self, name: str, help: str, run: Callable[[argparse.Namespace], int | None]
    ) -> argparse.ArgumentParser:
        """Add a command; `run` gets what was typed, and may return an exit status."""
        parser = self._commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            parents=[self._shared],
            formatter_class=DefaultsInHelp,
        )
        parser.set_defaults(run=run)
        return parser


class DefaultsInHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to an option's help, unless the help says it in words or the option is a flag."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        in_words = "(default: " in (action.help or "")
        # A number's default of 0 equals False, and is worth saying.
        if in_words or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def let_options_interrupt(
    parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any]
) -> None:
    """Let the list of positionals `name`, of type `kind`, go on after an option.

    argparse gives up on such a list once an option has interrupted it; `parse` takes up the rest.
    """
    parser.set_defaults(interrupted_list=name, interrupted_type=kind)


def add_store_options(parser: argparse.ArgumentParser, help: str) -> None:
    """Add the options that say where an index's chunks are kept. help: of the first one."""
    parser.add_argument("--store", metavar="URL", help=help)
    parser.add_argument(
        "--collection", help="of Milvus (default: the saved one; memlm for a new index)"
    )


def store_of(arguments: argparse.Namespace) -> Any:
    """What these options name, as `store=` takes it: None, an address, or one with a collection."""
    if arguments.collection is None:
        return arguments.store
    if arguments.store is None:
        raise ValueError(
            f"collection={arguments.collection!r} is Milvus's; give --store URL with it"
        )
    from memlm.retrieval import MilvusStore

    return MilvusStore(arguments.store, arguments.collection)


def add_sample_options(parser: argparse.ArgumentParser, first: str = "") -> None:
    """Add the options that say which samples are made.

    first: the help's words for where a default is looked for before `SAMPLE_DEFAULTS`.
    """

    def default(name: str) -> str:
        value = SAMPLE_DEFAULTS[name]
        return f" (default: {first}{' '.join(value) if isinstance(value, list) else value})"

    parser.add_argument(
        "--tasks",
        nargs="+",
        help="qa1 to qa20, or probes: passkey recall-8 s-niah-1" + default("tasks"),
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        help="tokens of context: 0k 4k 128k 1M ..." + default("lengths"),
    )
    parser.add_argument(
        "--samples", type=int, help="samples per task and length" + default("samples")
    )
    parser.add_argument(
        "--haystack",
        help="builtin, installed, made, a text file or folder, or hub:ID; several joined by +"
        + default("haystack"),
    )
    parser.add_argument(
        "--stories", default="generated", help="generated, or a folder of bAbI's own files"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument(
        "--position",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="keep the facts between two fractions of the document (default: 0 1)",
    )
    parser.add_argument(
        "--distance", type=int, help="tokens from the earliest supporting fact to the question"
    )
    parser.add_argument(
        "--composition",
        choices=["exact", "published"],
        default="exact",
        help="exact: 4k is 4,096 tokens of facts and noise; published: lengths, facts and noise by the "
        "rules of the published code (4k is 4,000 less 300)",
    )


# The options that `add_sample_options` adds.
_SAMPLE_OPTIONS = (
    "tasks", "lengths", "samples", "haystack", "stories", "seed", "position", "distance", "composition",
)  # fmt: skip


def sample_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of these options, by the names that functions know them by."""
    found = {name: getattr(arguments, name) for name in _SAMPLE_OPTIONS}
    return {**found, "position": tuple(found["position"])}


def sample_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The samples' settings: as typed, else of the recipe in the model's folder, else `SAMPLE_DEFAULTS`."""
    typed = {name: getattr(arguments, name) for name in SAMPLE_DEFAULTS}
    typed = {name: value for name, value in typed.items() if value is not None}
    from memlm.eval.running.own import are_own_questions
    from memlm.pretrained import resolve_pretrained

    if are_own_questions(arguments.data):
        # They have neither tasks nor lengths, and all of them are asked.
        rest = {name: SAMPLE_DEFAULTS[name] for name in ("haystack", "batch_size")}
        return {"tasks": None, "lengths": None, "samples": None, **rest, **typed}
    path = Path(resolve_pretrained(arguments.model)) / "recipe.yaml"
    if not path.is_file():
        return {**SAMPLE_DEFAULTS, **typed}
    from memlm.train.recipe import EvalSection, read_yaml
    from memlm.train.recipe.binding import bind, plain

    said = read_yaml(path).get("eval") or {}
    section = bind(EvalSection, said, "eval")
    found = {name: plain(getattr(section, name)) for name in said if name not in typed}
    if arguments.data is not None:
        found.pop("haystack", None)
    if found:
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        print(f"memlm: as {path} says: {told}", file=sys.stderr)
    return {**SAMPLE_DEFAULTS, **found, **typed}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where a model runs, and in which numbers."""
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... or auto")
