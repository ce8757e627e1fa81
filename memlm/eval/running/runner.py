"""Evaluate a model on BABILong and the probes: read documents, ask, score, keep every sample on disk.

A model with memory reads samples of all lengths side by side, the longest first; a baseline, batches of one
cell. A run that was killed goes on after its last answers, in the middle of what it was reading.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.eval.log import SAMPLES, Row, RunLog, join_parts, part_of, recorded
from memlm.eval.processes import Processes
from memlm.eval.provenance import (
    dtype_of,
    fingerprint,
    schedule_of,
    versions,
    without_training,
    write_thresholds,
)
from memlm.eval.reporting.plots import save_with_picture
from memlm.eval.reporting.report import Cell, Report
from memlm.eval.running.baselines import MODEL, RECALLING, is_memory_model, make_reader
from memlm.eval.running.batches import (
    Batch,
    BatchRunner,
    Recall,
    group_by_text,
    joined,
    split_into_batches,
)
from memlm.eval.running.checks import (
    cells_to_evaluate,
    check_composition,
    check_own_questions,
)
from memlm.eval.running.own import OwnQuestions, are_own_questions
from memlm.eval.running.prompts import Prompts
from memlm.eval.running.samples import Composed, Published, SampleSource
from memlm.retrieval.embedders import HashingEmbedder
from memlm.retrieval.retriever import RetrievalConfig
from memlm.tasks.babilong import Composition, composition_of
from memlm.tasks.haystack import Haystack, Split
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.tasks.haystack.installed import manifest
from memlm.tasks.haystack.sources import parts_of
from memlm.tasks.lengths import format_length
from memlm.templates import BABILONG_QUESTION_TEMPLATE, DOCUMENT_RECALL_TEMPLATE

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM
    from memlm.retrieval.base import Embedder

# Passages of the baseline "retrieval", unless told otherwise.
RECALLED = 5
# Samples of a task and length, unless told otherwise.
SAMPLES_PER_CELL = 100
# The memory of a document that is being read.
UNFINISHED = "unfinished.safetensors"
# Tokens of an answer, as in the published evaluation.
MAX_NEW_TOKENS = 20


def evaluate(
    model: MemLMForCausalLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[str | int] | None = None,
    samples: int | None = None,
    *,
    haystack: str | os.PathLike[str] | Haystack = "builtin",
    stories: str | os.PathLike[str] = "generated",
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    baseline: str | None = MODEL,
    window: int | None = None,
    prompt: str | os.PathLike[str] | None = None,
    position: tuple[float, float] = (0.0, 1.0),
    distance: int | None = None,
    composition: str | Composition = "exact",
    retrieval: int | RetrievalConfig | None = None,
    embedder: Embedder | None = None,
    batch_size: int = 8,
    seed: int = 0,
    max_new_tokens: int | None = None,
    split: Split = "eval",
    progress: bool = True,
) -> Report:
    """Score `model` on `samples` documents of every task and length, or on one's own questions, and report.

    model: of memlm, or any causal language model of transformers. tasks: bAbI's, or probes
    (`memlm.tasks.registry.TASKS`). haystack: a source, of which `split` is used. stories: "generated" or a
    folder of bAbI files, of which the test file is preferred. data: samples in the published layout (a hub
    id or a folder) in place of composed ones; or own questions (a file of rows with "document" and
    "questions", a folder of such files or "hub:ID"), without tasks and lengths, scored by SQuAD's exact
    match and F1. samples: 100 by default; of own questions the first so many, by default all. baseline: who
    reads: "model", the given model itself, or a name of `BASELINES`. The base model reads for "last-tokens"
    (only the end of the document), "full" (attention to all of it), "window" (a sliding window), "chunks"
    (one chunk after the other) and "retrieval" (recalled passages); the memory model for "twice" (the
    document twice), "question-first", "passages" (what is recalled, in place of the document), "reread"
    (the document, then what is recalled) and "silenced" (nothing remembered). window: tokens that
    "last-tokens", "window" and "chunks" see. prompt: "answer", "instruction", "chat" or a YAML file; None
    picks "answer" for models of memlm, else "chat" where the tokenizer has a chat template and
    "instruction" where it has none. position, distance: where facts stand, as in `babilong.compose`.
    composition: "exact", or "published" for lengths, facts and noise by the published code's rules
    (`babilong.Composition`). retrieval: how many passages of the document are recalled before the question,
    from an index made for each sample; 5 for "retrieval", "passages" and "reread" when this is None.
    embedder: that of the index, a HashingEmbedder by default. batch_size: samples that are read side by
    side, of one task and length by baselines, of any by a memory model. max_new_tokens: tokens of an
    answer; None is what the run in `out` has, else 20, or what the longest right answer takes.

    With `out`, answers are appended to `samples.jsonl` as they come, and a later call with the same
    settings goes on from there (more samples, tasks and lengths may be asked for). `summary.json` and
    `accuracy.png` are written at the end, about all that the folder holds. Cells that a baseline cannot
    take are left out, with the reason in `report.skipped`. Under `accelerate launch` or torchrun, processes
    share the samples, and process 0 joins their files and writes the report of all. ValueError on arguments
    that cannot work, before any work is done.
    """
    processes = Processes.current()
    if processes.count > 1 and out is None:
        raise ValueError(
            f"out=None, but {processes.count} processes join what they found in a folder; give out"
        )
    own_questions = are_own_questions(data)
    if own_questions:
        check_own_questions(tokenizer, tasks, lengths, data, out)
        plan = []
    else:
        plan = cells_to_evaluate(tokenizer, tasks, lengths, haystack, stories, data, out, seed)
        samples = SAMPLES_PER_CELL if samples is None else samples
    if max_new_tokens is None:
        max_new_tokens = int(recorded(out).get("max_new_tokens", MAX_NEW_TOKENS))
    for name, value in (
        ("samples", samples), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)
    ):  # fmt: skip
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rules = composition_of(composition, position=position, distance=distance)
    check_composition(
        plan, rules, data, haystack=haystack, stories=os.fspath(stories), position=tuple(position),
        distance=distance, composition=rules.settings(), split=split, seed=seed,
    )  # fmt: skip
    if embedder is not None and retrieval is None and baseline not in RECALLING:
        raise ValueError(
            "embedder finds passages to recall, but retrieval is None; give retrieval, the number of "
            "passages, or leave embedder out"
        )
    prompts = _prompts(model, tokenizer, prompt, own_questions)
    if retrieval is None and baseline in RECALLING:
        retrieval = RetrievalConfig(k=RECALLED)
    elif retrieval is not None and not isinstance(retrieval, RetrievalConfig):
        retrieval = RetrievalConfig(k=retrieval)
    recall = None
    if retrieval is not None:
        template = _config(model, "recall_template", DOCUMENT_RECALL_TEMPLATE)
        recall = Recall(retrieval, embedder or HashingEmbedder(), template)
    own = prompts.style == "answer" and _config(model, "question_segment", "open") == "own"
    with ExitStack() as stack:
        # The model is lent: it goes back as it was, whatever happens.
        stack.enter_context(without_training(model))
        kept = None if out is None else Path(out) / UNFINISHED
        if kept is not None and processes.part is not None:
            kept = part_of(kept, processes.part)
        reader = make_reader(model, tokenizer, baseline, window, own, kept)
        stack.callback(reader.close)
        if data is not None and own_questions:
            questions = OwnQuestions(data, tokenizer, samples)
            source: SampleSource = questions
            plan = list(questions.cells)
        elif data is not None:
            source = Published(data, tokenizer)
        else:
            if isinstance(haystack, Haystack):
                noise = haystack.tokenized(tokenizer)
            else:
                noise = tokenized_haystack(haystack, split, tokenizer)
            source = Composed(
                stories, noise, tokenizer, seed,
                position=position, distance=distance, composition=rules,
            )  # fmt: skip
        counts = {cell: source.prepare(*cell, samples or 0) for cell in plan}
        settings = {
            **source.settings(),
            **reader.settings(),
            **({} if recall is None else recall.settings()),
            "split": split,
            "prompt": prompts.style,
            "prompt_digest": prompts.digest,
            "max_new_tokens": max_new_tokens,
            "model": fingerprint(model),
        }
        # Needed to repeat the run, but without influence on it, or in the settings as a digest already.
        about: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype_of(model)}
        if prompts.file is not None:
            about["prompt_file"] = prompts.file
        if "installed" in parts_of(source.settings().get("haystack", "")):
            about["haystack_manifest"] = manifest(split)
        thresholds = write_thresholds(model)
        # A silenced run says so itself.
        if len(thresholds) == 1 and 0 < thresholds[0] < math.inf:
            about["write_threshold"] = thresholds[0]
        runner = BatchRunner(reader, source, prompts, tokenizer, max_new_tokens, batch_size, recall)
        # Process 0 first: it joins what processes of a broken run left, before others read it.
        if not processes.first:
            processes.wait()
        log = RunLog(out, settings, part=processes.part)
        processes.forget_skipped(out)
        if processes.first:
            processes.wait()
        _check_log(log, source, counts)
        if reader.mixes:
            pending = group_by_text(counts, source, reader.shares_texts, log)
            todo = joined(processes.share(pending))
        else:
            todo = processes.share(split_into_batches(counts, batch_size, log))
        # Until every process knows what there is to do, none may write.
        processes.wait()
        with log:
            shown = progress and processes.first
            skipped = runner.run(todo, log, stack.enter_context(_bar(todo, shown)))
        if out is not None and processes.count > 1:
            skipped = processes.join_skipped(Path(out), skipped)
            if processes.first:
                order = [(t, format_length(n), i) for (t, n), c in counts.items() for i in range(c)]
                join_parts(Path(out) / SAMPLES, log.keys, order)
            processes.wait()
            log.read_again()
    wanted = {
        (task, format_length(length)): count
        for (task, length), count in counts.items()
        if format_length(length) not in skipped.get(task, {})
    }
    cells = _cells(log, wanted, skipped)
    report = Report(
        cells,
        settings | about | schedule_of(model),
        versions(model),
        source.notes,
        skipped=skipped,
    )
    if out is None or not processes.first:
        return report
    return replace(
        report, files=tuple(map(str, [Path(out) / SAMPLES, *save_with_picture(report, out)]))
    )


def _config(model: Any, name: str, default: Any) -> Any:
    return getattr(model.config, name, default) if is_memory_model(model) else default


def _prompts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | os.PathLike[str] | None,
    own_questions: bool,
) -> Prompts:
    if prompt is None:
        chats = getattr(tokenizer, "chat_template", None) is not None
        prompt = "answer" if is_memory_model(model) else "chat" if chats else "instruction"
    template = _config(model, "question_template", BABILONG_QUESTION_TEMPLATE)
    # A model of memlm was trained on composed documents without a start token, and on own ones with it.
    bare = is_memory_model(model) and prompt == "answer" and not own_questions
    return Prompts.of(prompt, tokenizer, template, bare)


def _check_log(log: RunLog, source: SampleSource, counts: dict[tuple[str, int], int]) -> None:
    """Refuse to go on with rows that are about other samples."""
    for (task, length), count in counts.items():
        for index in range(count):
            row = log.rows.get((task, format_length(length), index))
            if row is not None and not source.holds(row):
                raise ValueError(
                    f"out holds a run on other data: its sample {index} of {task} at "
                    f"{format_length(length)} asks {row['question']!r}; use another folder"
                )


def _bar(todo: Sequence[Batch], progress: bool) -> tqdm:
    from tqdm import tqdm

    return tqdm(
        total=sum(batch.cost for batch in todo),
        unit="tok",
        unit_scale=True,
        disable=not progress,
        smoothing=0.05,
        mininterval=0.5,
    )


def _cells(
    log: RunLog, wanted: dict[tuple[str, str], int], skipped: dict[str, dict[str, str]]
) -> list[Cell]:
    """The cells this call asked for, followed by what the folder holds of earlier calls.

    A cell that was given up half-way does not count as a result.
    """
    found: dict[tuple[str, str], list[Row]] = {cell: [] for cell in wanted}
    for (task, length, index), row in log.rows.items():
        given_up = length in skipped.get(task, {})
        if not given_up and index < wanted.get((task, length), index + 1):
            found.setdefault((task, length), []).append(row)
    return [_cell(task, length, rows) for (task, length), rows in found.items()]


def _cell(task: str, length: str, rows: Sequence[Row]) -> Cell:
    sums: dict[str, float] = defaultdict(float)
    for row in rows:
        for key in ("correct", "exact", "published", "tokens", "seconds", "data_seconds"):
            sums[key] += row[key]
    return Cell(
        task,
        length,
        samples=len(rows),
        correct=int(sums["correct"]),
        exact=int(sums["exact"]),
        published=int(sums["published"]),
        tokens=int(sums["tokens"]),
        seconds=sums["seconds"],
        data_seconds=sums["data_seconds"],
        peak_memory_bytes=max(row["peak_memory_bytes"] for row in rows),
        # A text shorter than a segment is not read, and counts none.
        writes=sum(row.get("writes", 0) for row in rows)
        if any("writes" in row for row in rows)
        else None,
        f1=sum(row["f1"] for row in rows) if all("f1" in row for row in rows) else None,
    )
