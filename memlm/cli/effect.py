"""`memlm eval effect`: whether a trained memory works, and what training it cost the base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memlm.cli.models import load_model, load_named
from memlm.cli.options import (
    Commands,
    add_device_options,
    add_sample_options,
    sample_options,
    sample_settings,
)
from memlm.cli.printing import print_written


def add_to(commands: Commands) -> None:
    """Add `memlm eval effect`."""
    effect = commands.add(
        "eval effect", "report whether a trained memory works, and what it cost the base", run
    )
    effect.add_argument("model", help="folder, hub id or shipped name (qa1) of a memory model")
    add_sample_options(effect, "the training recipe's, else ")
    effect.add_argument(
        "--data",
        help="in place of composed samples, as for memlm eval: own questions, for instance",
    )
    effect.add_argument(
        "--base",
        help="the base before training (default: the one that the model names; nothing is compared with it "
        "where the model was trained from random weights)",
    )
    effect.add_argument(
        "--none",
        metavar="MODEL",
        help="a model trained without memory (default: the trained base, which sees one segment)",
    )
    effect.add_argument(
        "--documents", type=int, default=32, help="texts for the base's own predictions"
    )
    effect.add_argument("--out", type=Path, required=True, help="folder for the report")
    effect.add_argument("--batch-size", type=int, help="samples read side by side (default: 8)")
    effect.add_argument("--max-new-tokens", type=int, help="most tokens of an answer")
    add_device_options(effect)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, write the report and name its files."""
    from memlm.card import base_name
    from memlm.eval.effect import effect

    asked = {**sample_options(arguments), **sample_settings(arguments)}
    model, tokenizer = load_model(arguments)
    found = effect(
        model,
        tokenizer,
        _base(arguments, base_name(model.config.to_dict())),
        arguments.out,
        none=None if arguments.none is None else load_named(arguments.none, arguments),
        documents=arguments.documents,
        data=arguments.data,
        max_new_tokens=arguments.max_new_tokens,
        **asked,
    )
    for name, report in found.reports.items():
        print(f"{name}\n{report.to_markdown()}\n")
    print(found.kept)
    print_written(found.files)


def _base(arguments: argparse.Namespace, named: str) -> Any:
    """The base before training; None where there was none."""
    name = arguments.base or named
    if not name:
        return None
    try:
        return load_named(name, arguments)
    except OSError as error:
        raise OSError(f"{error}; name the base before training with --base") from error
