"""`memlm eval`: any causal language model on BABILong and probes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from memlm.cli.models import load_model
from memlm.cli.options import (
    Commands,
    add_device_options,
    add_sample_options,
    sample_options,
    sample_settings,
)
from memlm.cli.printing import print_written


def add_to(commands: Commands) -> None:
    """Add `memlm eval`."""
    evaluate = commands.add(
        "eval",
        "evaluate any causal language model on BABILong and probes, at any length",
        run,
    )
    evaluate.add_argument(
        "model", help="folder, hub id or shipped name (qa1) of a model, with or without memory"
    )
    add_sample_options(evaluate, "the training recipe's, else ")
    evaluate.add_argument(
        "--data",
        help="in place of composed samples: those of a folder or hub id in the published layout, such as "
        "RMT-team/babilong; or own questions, a file with rows of document and questions, or hub:ID",
    )
    evaluate.add_argument(
        "--baseline",
        type=_baseline,
        choices=[
            "model", "last-tokens", "full", "window", "retrieval", "chunks", "twice", "question-first",
            "passages", "reread", "silenced",
        ],
        help="who reads: the model itself (the default: into its memory; as full where it has none), the "
        "base model, which sees the last tokens alone, everything, a sliding window, retrieved passages, "
        "or one chunk after the other (the surest answers), or the memory model, reading twice, with the "
        "question first, retrieved passages alone or after the document, or with its memory silenced",
    )  # fmt: skip
    evaluate.add_argument(
        "--window",
        type=int,
        help="tokens that --baseline last-tokens, window and chunks see (default: one segment)",
    )
    evaluate.add_argument(
        "--retrieval", type=int, metavar="K", help="recall K passages before the question"
    )
    evaluate.add_argument("--chunk-size", type=int, help="words of a passage (default: 64)")
    evaluate.add_argument("--hops", type=int, help="searches for each question (default: 1)")
    evaluate.add_argument(
        "--prompt",
        help="answer (document, then question), instruction, chat, or a YAML file of prompts "
        "(default: answer for models of memlm, chat or instruction for others)",
    )
    evaluate.add_argument(
        "--write-threshold",
        type=float,
        metavar="GATE",
        help="write gates below it count as zero (default: as the model was saved)",
    )
    evaluate.add_argument("--out", type=Path, required=True, help="folder for the results")
    evaluate.add_argument(
        "--batch-size",
        type=int,
        help="samples read side by side (default: the training recipe's, else 8)",
    )
    evaluate.add_argument(
        "--max-new-tokens",
        type=int,
        help="most tokens of an answer (default: as the run in --out has it, else 20)",
    )
    add_device_options(evaluate)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the table and name the files."""
    from memlm.eval import evaluate

    retrieval = retrieval_asked(arguments)
    asked = sample_settings(arguments)
    model, tokenizer = load_model(arguments, memory=False)
    if arguments.write_threshold is not None:
        if not hasattr(model, "set_memory_options"):
            raise ValueError(
                f"--write-threshold is about write gates, and {arguments.model!r} has no memory; leave "
                "it out"
            )
        model.set_memory_options(write_threshold=arguments.write_threshold)
    report = evaluate(
        model,
        tokenizer,
        **{**sample_options(arguments), **asked},
        data=arguments.data,
        out=arguments.out,
        baseline=arguments.baseline,
        window=arguments.window,
        prompt=arguments.prompt,
        retrieval=retrieval,
        max_new_tokens=arguments.max_new_tokens,
        progress=True,
    )
    if not report.files:
        return  # Of several processes, the first one tells.
    print(report.to_markdown())
    if written := report.writes_note():
        print(written)
    print_written(report.files)


def retrieval_asked(arguments: argparse.Namespace) -> Any:
    """What is recalled before a question; None for nothing."""
    from memlm.eval.running.baselines import RECALLING
    from memlm.eval.running.runner import RECALLED
    from memlm.retrieval.retriever import RetrievalConfig

    k = arguments.retrieval
    if k is None and arguments.baseline in RECALLING:
        k = RECALLED
    how = {"size": arguments.chunk_size, "hops": arguments.hops}
    given = {name: value for name, value in how.items() if value is not None}
    if k is None and given:
        raise ValueError(
            "--chunk-size and --hops say how passages are recalled, and none are; add --retrieval K, or "
            "leave them out"
        )
    return None if k is None else RetrievalConfig(k=k, **given)


def _baseline(word: str) -> str:
    """A baseline by its present word, with a note where it was typed by a former one."""
    from memlm.eval.running.baselines import present_word

    return present_word(word)
