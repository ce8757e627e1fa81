"""`memlm demo`: a small memory model, trained or shipped, questioned at a million tokens."""

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
    demo.add_argument(
        "--pretrained",
        nargs="?",
        const="qa1",
        metavar="NAME",
        help="train nothing: question a model shipped with memlm (qa1 where no NAME follows), in a minute "
        "or two",
    )
    demo.add_argument("--out", type=Path, help="folder of the run (default: demo-run)")
    demo.add_argument("--seed", type=int, default=0, help="seed of weights, data and samples")
    demo.add_argument(
        "--ask", type=Path, metavar="FILE", help="also ask about a text file of yours"
    )
    demo.add_argument(
        "-q", "--question", action="append", help="a question about --ask FILE; may be repeated"
    )
    demo.add_argument(
        "--quick",
        action="store_true",
        help="a short run: a short document, and training too little to answer well",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the demonstration and name its files."""
    from memlm.demo import demo, pretrained_demo

    own = {"file": arguments.ask, "questions": arguments.question or ()}
    asked = {"seed": arguments.seed, "quick": arguments.quick, **own}
    if arguments.pretrained is None:
        print_written(demo(arguments.out or Path("demo-run"), **asked))
        return
    if arguments.out is not None:
        raise ValueError("--pretrained trains and writes nothing; leave --out out")
    pretrained_demo(arguments.pretrained, **asked)
