"""The demo: a small memory model learns bAbI's first task in real text, and answers at a million tokens.

Two models of the same size are trained from scratch, one with memory and one without, evaluated on the
same documents at growing lengths, and the one with memory answers questions about a document of a
million tokens that it reads as a stream. Everything is resumable: the same command goes on. Or a model
that is shipped with memlm answers them at once (`pretrained_demo`).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from memlm.files import write_text
from memlm.text import check_text_file, read_text

MEMORY, NONE = "gated-delta", "none"
RECIPES = {MEMORY: "tiny-delta-qa1", NONE: "tiny-none-qa1"}
# Samples by length: fewer where each costs more. Without memory all lengths are alike.
SAMPLES = {
    MEMORY: {"1k": 100, "4k": 100, "16k": 100, "64k": 40, "128k": 20, "1M": 10},
    NONE: {"1k": 100, "4k": 100, "16k": 100, "64k": 40, "128k": 20, "1M": 4},
}
QUICK = {"1k": 8, "4k": 8}
QUICK_STEPS = "training.max_steps=60"
STREAM_TOKENS, QUICK_TOKENS = 2**20, 2**14
# The places where somebody may be in qa1.
PLACES = 6


def demo(
    out: str | os.PathLike[str],
    seed: int = 0,
    quick: bool = False,
    file: str | os.PathLike[str] | None = None,
    questions: Sequence[str] = (),
) -> list[Path]:
    """Train, evaluate, ask; print a table and return the files written.

    file, questions: a text file of the user's, read and asked about at the end. ValueError on a file
    that is no text, before anything is trained.
    """
    _check_own(file, questions)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    print(
        f"memlm demo, seed {seed}: train two small models, with memory ({MEMORY}) and without, on\n"
        "bAbI qa1 inside English text, then ask both where somebody is, at up to a million tokens.\n"
        f"Everything is written to {out}/; interrupt and run again to go on.\n",
        flush=True,
    )
    # The model without memory runs beside the other, so that two cores are used by one thread each.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        beside = pool.submit(_work, NONE, str(out), seed, quick, False)
        work = {MEMORY: _work(MEMORY, str(out), seed, quick, True)}
        print("waiting for the model without memory ...", flush=True)
        work[NONE] = _result(beside)
    table = _table(work)
    print("\n" + table)
    picture = _plot(out)
    before = time.process_time()
    model, tokenizer = load(out / MEMORY)
    stream_report = _stream(model, tokenizer, seed + 1, quick)
    if file is not None:
        stream_report += "\n" + _own(model, tokenizer, file, questions)
    print(stream_report)
    work[MEMORY]["cpu_seconds"] += time.process_time() - before
    cpu = sum(w["cpu_seconds"] for w in work.values())
    line = (
        f"{time.perf_counter() - began:.0f} s of wall time now, {cpu / 60:.1f} CPU-minutes in all; "
        f"{os.cpu_count()} cores, one thread per model."
    )
    print(line)
    report = out / "report.md"
    write_text(report, f"{table}\n{stream_report}\n{line}\n")
    return [report, picture, out / MEMORY, out / NONE]


def _work(name: str, out: str, seed: int, quick: bool, progress: bool) -> dict[str, Any]:
    """Train one model and evaluate it at all lengths, in a separate process."""
    import torch
    import transformers

    from memlm.eval import evaluate
    from memlm.train import Recipe, train

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = Path(out) / name
    overrides = [f"seed={seed}"] + ([QUICK_STEPS] if quick else [])
    result = train(Recipe.load(RECIPES[name], overrides=overrides), folder, progress=progress)
    if not result.finished:
        raise KeyboardInterrupt
    if progress:
        print(f"trained in {result.cpu_seconds:.0f} CPU seconds; evaluating", flush=True)
    before = time.process_time()
    model, tokenizer = load(folder)
    plan = QUICK if quick else SAMPLES[name]
    cells = []
    for length, samples in plan.items():
        report = evaluate(
            model,
            tokenizer,
            tasks=["qa1"],
            lengths=[length],
            samples=samples,
            out=Path(out) / f"eval-{name}" / length,
            batch_size=min(samples, 20),
            seed=seed + 1,
            max_new_tokens=4,
            progress=progress,
        )
        cells += [cell.__dict__ for cell in report.cells]
    return {
        "cells": cells,
        "train_cpu_seconds": result.cpu_seconds,
        "cpu_seconds": result.cpu_seconds + time.process_time() - before,
    }


def load(folder: Path) -> tuple[Any, Any]:
    """A trained model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import memlm.modeling  # noqa: F401 - registers the model with the Auto classes

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _cells(work: dict[str, Any]) -> dict[str, Any]:
    from memlm.eval.reporting.report import Cell

    return {cell["length"]: Cell(**cell) for cell in work["cells"]}


def _table(work: dict[str, dict[str, Any]]) -> str:
    memory, none = _cells(work[MEMORY]), _cells(work[NONE])
    lines = [
        f"| length | {MEMORY} | samples | {NONE} | samples | tokens/s | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for length, cell in memory.items():
        other = none[length]
        lines.append(
            f"| {length} | {cell.accuracy:.0%} | {cell.samples} | {other.accuracy:.0%} | "
            f"{other.samples} | {cell.tokens_per_second:,.0f} | "
            f"{cell.peak_memory_bytes / 2**20:,.0f} MiB |"
        )
    lines.append(
        f"\nGuessing among {PLACES} places is right in {1 / PLACES:.0%} of cases. Training took "
        f"{work[MEMORY]['train_cpu_seconds']:.0f} ({MEMORY}) and "
        f"{work[NONE]['train_cpu_seconds']:.0f} ({NONE}) CPU seconds. Speed and memory are those of "
        f"{MEMORY}."
    )
    return "\n".join(lines)


def _plot(out: Path) -> Path:
    from memlm.eval.reporting.plots import plot_lines
    from memlm.eval.reporting.report import Report

    reports = {}
    for name in RECIPES:
        found = sorted((out / f"eval-{name}").iterdir())
        parts = [Report.load(folder) for folder in found]
        cells = [cell for part in parts for cell in part.cells]
        reports[name] = Report(cells, parts[0].settings, parts[0].versions)
    plot_lines(reports, out / "accuracy.png", chance=1 / PLACES)
    return out / "accuracy.png"


def pretrained_demo(
    name: str,
    seed: int = 0,
    quick: bool = False,
    file: str | os.PathLike[str] | None = None,
    questions: Sequence[str] = (),
) -> None:
    """Let a shipped model answer about a document of a million tokens, and about a file of the user's.

    ValueError on an unknown name or a file that is no text, before anything is read.
    """
    _check_own(file, questions)
    import torch

    from memlm.pretrained import load_pretrained

    torch.set_num_threads(1)
    model, tokenizer = load_pretrained(name)
    weights = sum(parameter.numel() for parameter in model.parameters())
    print(f"memlm demo: the shipped model {name}, {weights:,} parameters, seed {seed}.", flush=True)
    # The user's own text first: it is short, and what they wait for.
    if file is not None:
        print("\n" + _own(model, tokenizer, file, questions), flush=True)
    print(_stream(model, tokenizer, seed + 1, quick))


def _check_own(file: str | os.PathLike[str] | None, questions: Sequence[str]) -> None:
    if (file is None) != (not questions):
        raise ValueError("--ask FILE and -q QUESTION belong together; give both or neither")
    if file is not None:
        check_text_file(file)


def _stream(model: Any, tokenizer: Any, seed: int, quick: bool) -> str:
    """Read a long document through DocumentStream, and ask where everybody in it is."""
    import numpy as np
    from tqdm import tqdm

    from memlm import DocumentStream
    from memlm.tasks import babi
    from memlm.tasks.babilong import compose
    from memlm.tasks.haystack import Haystack

    # The last question of a story, which has the most facts before it.
    story = next(itertools.islice(babi.generate("qa1", seed), 4, None))
    noise = Haystack.open("builtin", "eval").tokenized(tokenizer)
    tokens = QUICK_TOKENS if quick else STREAM_TOKENS
    sample = compose(story, noise, tokens, tokenizer, np.random.default_rng(seed))

    def pages(bar: Any) -> Iterator[str]:
        for piece in sample:
            yield piece
            bar.update(len(piece))

    stream = DocumentStream(model, tokenizer)
    began = time.perf_counter()
    with tqdm(desc="reading a document", unit="char", unit_scale=True, leave=False) as bar:
        stream.write(pages(bar))
    seconds = time.perf_counter() - began
    lines = [
        f"\nA document of {stream.tokens_seen:,} tokens, read in {seconds:.0f} s into "
        f"{stream.memory_bytes:,} bytes of memory. Somewhere in it stands:",
    ]
    for at, fact in zip(sample.fact_offsets, story.facts, strict=True):
        lines.append(f"  token {at:>9,}: {fact}")
    for person in dict.fromkeys(fact.split()[0] for fact in story.facts):
        question = f"Where is {person}?"
        right = babi.solve(story.facts, question)
        lines.append(f"{question}  -> {stream.ask(question)}  (right: {right})")
    return "\n".join(lines)


def _own(model: Any, tokenizer: Any, file: str | os.PathLike[str], questions: Sequence[str]) -> str:
    """Read the user's file and ask the user's questions."""
    from memlm import DocumentStream

    stream = DocumentStream(model, tokenizer)
    stream.write(read_text(file))
    answers = [f"{question}  -> {stream.ask(question)}" for question in questions]
    return "\n".join([f"{file}: {stream.tokens_seen:,} tokens.", *answers])
