"""`memlm data`: writes a data set in the published layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from memlm.cli.options import SAMPLE_DEFAULTS, Commands, add_sample_options, sample_options
from memlm.cli.printing import print_written
from memlm.pretrained import resolve_pretrained


def add_to(commands: Commands) -> None:
    """Add `memlm data`."""
    data = commands.add("data", "write a BABILong data set in the published layout", run)
    data.add_argument("kind", choices=["babilong"], help="which data set")
    add_sample_options(data)
    data.set_defaults(
        **{name: value for name, value in SAMPLE_DEFAULTS.items() if name != "batch_size"}
    )
    data.add_argument("--out", type=Path, required=True, help="folder for data/TASK/LENGTH.json")
    data.add_argument(
        "--tokenizer",
        default="words",
        help="folder, hub id or shipped name (qa1) whose tokens count, or 'words'",
    )
    data.add_argument("--format", choices=["json", "parquet"], default="json", help="of the files")
    data.add_argument(
        "--reserve", type=int, default=0, help="tokens of each length left free (published: 300)"
    )
    data.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="facts and questions allowed for each token of the rest (published: 0.125, ARMT: 0.2)",
    )
    data.add_argument("--overwrite", action="store_true", help="write files again that exist")


def run(arguments: argparse.Namespace) -> None:
    """Write the data set and name its files."""
    from memlm.tasks import babilong

    print_written(
        babilong.write(
            arguments.out,
            **sample_options(arguments),
            tokenizer=resolve_pretrained(arguments.tokenizer),
            format=arguments.format,
            reserve=arguments.reserve,
            share=arguments.share,
            overwrite=arguments.overwrite,
        )
    )
