"""`memlm card`: the model card of a saved model, with what was measured beside it."""

from __future__ import annotations

import argparse
from pathlib import Path

from memlm.cli.options import Commands
from memlm.cli.printing import print_written


def add_to(commands: Commands) -> None:
    """Add `memlm card`."""
    card = commands.add(
        "card", "write the model card of a saved model, with its recipe and evaluations", run
    )
    card.add_argument("model", type=Path, metavar="DIR", help="folder of a saved model or adapter")
    card.add_argument(
        "--sources",
        type=Path,
        metavar="DIR",
        help="folder with the recipe and, in it or below, the evaluations (default: the model's own)",
    )
    card.add_argument(
        "--license", help="licence of the weights (default: as before, or the base's)"
    )
    card.add_argument(
        "--name", help="what loads the model: its id on the hub (default: the folder)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the card and name it."""
    from memlm.card import write_card

    print_written(
        [
            write_card(
                arguments.model,
                sources=arguments.sources or arguments.model,
                name=arguments.name,
                license=arguments.license,
            )
        ]
    )
