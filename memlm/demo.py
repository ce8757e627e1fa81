"""The demo: a small memory model learns bAbI's first task in real text, and answers at a million tokens.

Two models of the same size are trained from scratch, one with memory and one without, evaluated on the
same documents at growing lengths, and the one with memory answers a question about a document of a
million tokens that it reads as a stream. Everything is resumable: the same command goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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
STREAM_TOKENS = 2**20
# The places where somebody may be in qa1.
PLACES = 6


def demo(
    out: str | os.PathLike[str],
    seed: int = 0,
    quick: bool = False,
    file: str | os.PathLike[str] | None = None,
    question: str | None = None,
) -> list[Path]:
    """Train, evaluate, ask; print a table and return the files written.

    file, question: a text file of the user's, read and asked about at the end. ValueError on a file
    that is no text, before anything is trained.
    """
    if (file is None) != (question is None):
        raise ValueError("--ask FILE and -q QUESTION belong together; give both or neither")
    if file is not None:
        check_text_file(file)
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
    stream_report = _stream(out, seed, STREAM_TOKENS if not quick else 2**14, file, question)
    print(stream_report)
    work[MEMORY]["cpu_seconds"] += time.process_time() - before
    cpu = sum(w["cpu_seconds"] for w in work.values())
    line = (
        f"{time.perf_counter() - began:.0f} s of wall time now, {cpu / 60:.1f} CPU-minutes in all; "
        f"{os.cpu_count()} cores, one thread per model."
    )
    print(line)
    report = out / "report.md"
    report.write_text(f"{table}\n{stream_report}\n{line}\n", encoding="utf-8")
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


def _stream(
    out: Path,
    seed: int,
    tokens: int,
    file: str | os.PathLike[str] | None,
    question: str | None,
) -> str:
    """Ask about a long document, and about the user's own, through DocumentStream."""
    import numpy as np
    from tqdm import tqdm

    from memlm import DocumentStream
    from memlm.tasks import babi
    from memlm.tasks.babilong import compose
    from memlm.tasks.haystack import Haystack

    model, tokenizer = load(out / MEMORY)
    story = next(babi.generate("qa1", seed + 1))
    noise = Haystack.open("builtin", "eval").tokenized(tokenizer)
    sample = compose(story, noise, tokens, tokenizer, np.random.default_rng(seed + 1))

    def pages(bar: Any) -> Iterator[str]:
        for piece in sample:
            yield piece
            bar.update(len(piece))

    stream = DocumentStream(model, tokenizer)
    began = time.perf_counter()
    with tqdm(desc="reading a document", unit="char", unit_scale=True, leave=False) as bar:
        stream.write(pages(bar))
    seconds = time.perf_counter() - began
    facts = "\n".join(
        f"  token {at:>9,}: {fact}"
        for at, fact in zip(sample.fact_offsets, story.facts, strict=True)
    )
    answer = stream.ask(story.question)
    lines = [
        f"\nA document of {stream.tokens_seen:,} tokens, read in {seconds:.0f} s into "
        f"{stream.memory_bytes:,} bytes of memory. Somewhere in it stands:",
        facts,
        f"{story.question}  -> {answer}  (right: {story.answer})",
    ]
    if file is not None and question is not None:
        own = DocumentStream(model, tokenizer)
        own.write(read_text(file))
        lines.append(f"{file}: {own.tokens_seen:,} tokens. {question}  -> {own.ask(question)}")
    return "\n".join(lines)
