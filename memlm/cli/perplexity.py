"""`memlm eval perplexity`: whether loss keeps falling along long documents."""

from __future__ import annotations

import argparse
from pathlib import Path

from memlm.cli.models import load_model
from memlm.cli.options import Commands, add_device_options
from memlm.cli.printing import print_written


def add_to(commands: Commands) -> None:
    """Add `memlm eval perplexity`."""
    perplexity = commands.add(
        "eval perplexity", "measure whether loss keeps falling along long documents", run
    )
    perplexity.add_argument(
        "model", help="folder, hub id or shipped name (qa1) of a model, with or without memory"
    )
    perplexity.add_argument(
        "--haystack",
        default="builtin",
        help="builtin, installed, made, a text file or folder, or hub:ID; several joined by +",
    )
    perplexity.add_argument("--length", default="64k", help="tokens of each document")
    perplexity.add_argument("--documents", type=int, default=8, help="how many documents")
    perplexity.add_argument(
        "--segment-length", type=int, help="tokens a model without memory reads at a time"
    )
    perplexity.add_argument("--seed", type=int, default=0, help="seed of the choice of documents")
    perplexity.add_argument("--batch-size", type=int, default=4, help="documents read side by side")
    perplexity.add_argument("--out", type=Path, required=True, help="folder for the results")
    add_device_options(perplexity)


def run(arguments: argparse.Namespace) -> None:
    """Measure, print the table and name the files."""
    from memlm.eval.losses.measure import perplexity

    model, tokenizer = load_model(arguments, memory=False)
    report = perplexity(
        model,
        tokenizer,
        arguments.haystack,
        arguments.length,
        arguments.documents,
        segment_length=arguments.segment_length,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        out=arguments.out,
        progress=True,
    )
    print(report.to_markdown())
    print_written(report.files)
