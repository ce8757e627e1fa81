"""`memlm eval compare` and `memlm eval report`: finished evaluations side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from memlm.cli.options import Commands
from memlm.cli.printing import print_written


def add_to(commands: Commands) -> None:
    """Add `memlm eval compare` and `memlm eval report`."""
    compare = commands.add(
        "eval compare", "say whether two evaluations of the same samples differ", run_compare
    )
    compare.add_argument("a", type=Path, help="folder of an evaluation")
    compare.add_argument("b", type=Path, help="folder of another one")

    report = commands.add(
        "eval report", "draw evaluations side by side: pictures, tables, a page", run_report
    )
    report.add_argument(
        "runs", nargs="+", metavar="[NAME=]DIR", help="folders of evaluations, named as you like"
    )
    report.add_argument("--out", type=Path, required=True, help="folder for the report")


def run_compare(arguments: argparse.Namespace) -> None:
    """Print how the two evaluations differ."""
    from memlm.eval.reporting.compare import compare

    print(compare(arguments.a, arguments.b).to_markdown())


def run_report(arguments: argparse.Namespace) -> None:
    """Write the report and name its files."""
    from memlm.eval.reporting.page import write_report
    from memlm.eval.reporting.report import name_runs

    print_written(write_report(name_runs(arguments.runs), arguments.out))
