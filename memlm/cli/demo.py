"""`memlm demo`: a small memory model, trained and questioned at a million tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from memlm.cli.options import Commands
from memlm.cli.printing import print_written


def add_to(commands: Commands) -> None:
    """Add `memlm demo`."""
    demo = commands.add(
        "demo", "train a small memory model and question it at a million tokens", run
    )
    demo.add_argument("--out", type=Path, default=Path("demo-run"), help="folder of the run")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, data and samples")
    demo.add_argument(
        "--ask", type=Path, metavar="FILE", help="also ask about a text file of yours"
    )
    demo.add_argument("-q", "--question", help="the question about --ask FILE")
    demo.add_argument(
        "--quick", action="store_true", help="a short run: trains too little to answer well"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the demonstration and name its files."""
    from memlm.demo import demo

    print_written(
        demo(
            arguments.out,
            seed=arguments.seed,
            quick=arguments.quick,
            file=arguments.ask,
            question=arguments.question,
        )
    )
