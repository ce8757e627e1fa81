"""Evaluate a model on BABILong and the probes: read documents, ask, score, keep every sample on disk.

Samples run in the same batches whatever was done before, so a run that was killed and started again ends
as if it had never stopped.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from memlm.config import RECALL_TEMPLATE
from memlm.eval.reporting.report import Cell, Report
from memlm.eval.running.baselines import is_memory_model, make_reader
from memlm.eval.running.feed import Feed
from memlm.eval.running.log import SAMPLES, Row, RunLog, recorded
from memlm.eval.running.prompts import Prompts
from memlm.eval.running.provenance import dtype_of, fingerprint, versions, without_training
from memlm.eval.running.readers import Asked, Kept, Piece, Reader, TooLong
from memlm.eval.running.samples import Composed, Published, Sampled, Source
from memlm.retrieval.embedders import HashingEmbedder
from memlm.retrieval.retriever import Recalled, RetrievalConfig, read_document, render_parts
from memlm.tasks import babi
from memlm.tasks.babilong import (
    QUESTION_TEMPLATE,
    Composition,
    composition_of,
    format_length,
    parse_length,
)
from memlm.tasks.haystack import Haystack, Split, check_source
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.tasks.registry import find_task
from memlm.tokens import Part, encode_parts, leading_tokens

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM
    from memlm.retrieval.base import Embedder

MEMORY_POLL_SECONDS = 0.05
# Tokens made ahead of the model, in a thread.
AHEAD = 2**20
# Encoded prompts that are remembered.
MEMO = 10_000
# Passages of the baseline "retrieval", unless told otherwise.
RECALLED = 5
# Tokens of an answer, as in the published evaluation.
MAX_NEW_TOKENS = 20


def evaluate(
    model: MemLMForCausalLM | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[str | int],
    samples: int = 100,
    *,
    haystack: str | os.PathLike[str] | Haystack = "builtin",
    stories: str | os.PathLike[str] = "generated",
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    baseline: str | None = None,
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
    """Score `model` on `samples` documents of every task and length, and report.

    model: of memlm, or any causal language model of transformers. tasks: bAbI's, or probes
    (`memlm.tasks.registry.TASKS`). haystack: a source, of which `split` is used. stories: "generated" or a
    folder of bAbI files, of which the test file is preferred. data: samples in the published layout (a
    hub id or a folder) in place of composed ones. baseline: read in another way (`BASELINES`: "none",
    "full", "window") with the base model; window: tokens that "none" and "window" see. prompt: "answer",
    "instruction", "chat" or a YAML file; None picks "answer" for models of memlm, else "chat" where the
    tokenizer has a chat template and "instruction" where it has none. position, distance: where facts
    stand, as in `babilong.compose`. composition: "exact", or "published" for lengths, facts and noise by
    the published code's rules (`babilong.Composition`). retrieval: passages of the document recalled in
    front of the question, by an index of its own for every sample; the baseline "retrieval" shows the
    model nothing else (5 where it is not said). embedder: of that index, a HashingEmbedder by default.
    max_new_tokens: of an answer; None: what the run in `out` has, else 20.

    With `out`, each batch is appended to `samples.jsonl`, a later call with the same settings goes on
    from there (more samples, tasks and lengths may be asked for), and `summary.json` and `accuracy.png`
    are written at the end, about all that the folder holds. Cells that a baseline cannot take are left
    out, with the reason in `report.skipped`. ValueError on arguments that cannot work, before any work
    is done.
    """
    plan = _check(tokenizer, tasks, lengths, haystack, stories, data, out, seed)
    if max_new_tokens is None:
        max_new_tokens = int(recorded(out).get("max_new_tokens", MAX_NEW_TOKENS))
    for name, value in (
        ("samples", samples), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rules = composition_of(composition, position=position, distance=distance)
    _check_placed(
        plan, rules, data, haystack=haystack, stories=os.fspath(stories), position=tuple(position),
        distance=distance, composition=rules.settings(), split=split, seed=seed,
    )  # fmt: skip
    if embedder is not None and retrieval is None and baseline != "retrieval":
        raise ValueError(
            "embedder finds passages to recall, but retrieval is None; give retrieval, the number of "
            "passages, or leave embedder out"
        )
    prompts = _prompts(model, tokenizer, prompt)
    if retrieval is None and baseline == "retrieval":
        retrieval = RetrievalConfig(k=RECALLED)
    elif retrieval is not None and not isinstance(retrieval, RetrievalConfig):
        retrieval = RetrievalConfig(k=retrieval)
    recall = None
    if retrieval is not None:
        template = _config(model, "recall_template", RECALL_TEMPLATE)
        recall = _Recall(retrieval, embedder or HashingEmbedder(), template)
    own = prompts.style == "answer" and _config(model, "question_segment", "open") == "own"
    with ExitStack() as stack:
        # The model is lent: as it was again, whatever happens meanwhile.
        stack.enter_context(without_training(model))
        reader = make_reader(model, tokenizer, baseline, window, own, out)
        stack.callback(reader.close)
        if data is not None:
            source: Source = Published(data, tokenizer)
        else:
            if isinstance(haystack, Haystack):
                noise = haystack.tokenized(tokenizer)
            else:
                noise = tokenized_haystack(haystack, split, tokenizer)
            source = Composed(
                stories, noise, tokenizer, seed,
                position=position, distance=distance, composition=rules,
            )  # fmt: skip
        counts = {cell: source.prepare(*cell, samples) for cell in plan}
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
        # What decides nothing, or is in the settings by its digest, but is needed to repeat the run.
        about: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype_of(model)}
        if prompts.file is not None:
            about["prompt_file"] = prompts.file
        runner = _Runner(reader, source, prompts, tokenizer, max_new_tokens, recall)
        log = stack.enter_context(RunLog(out, settings))
        _check_log(log, source, counts)
        todo = [
            batch
            for (task, length), count in counts.items()
            for batch in _batches(task, length, count, batch_size)
            if not all(log.has(*key) for key in batch.keys())
        ]
        skipped = runner.run(todo, log, stack.enter_context(_bar(todo, progress)))
    wanted = {
        (task, format_length(length)): count
        for (task, length), count in counts.items()
        if format_length(length) not in skipped.get(task, {})
    }
    cells = _cells(log, wanted, skipped)
    report = Report(
        cells,
        settings | about,
        versions(model),
        source.notes,
        skipped=skipped,
    )
    if out is None:
        return report
    return replace(report, files=tuple(map(str, [Path(out) / SAMPLES, *report.save(out)])))


def _check(
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    lengths: Sequence[str | int],
    haystack: str | os.PathLike[str] | Haystack,
    stories: str | os.PathLike[str],
    data: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
    seed: int,
) -> list[tuple[str, int]]:
    """Refuse what cannot work before any work is done; return the cells to evaluate."""
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    lengths = [lengths] if isinstance(lengths, str | int) else list(lengths)
    if not tasks or not lengths:
        raise ValueError(f"tasks={tasks} and lengths={lengths} must each name at least one")
    for task in tasks:
        find_task(task)
        if data is None and os.fspath(stories) != "generated" and task in babi.TASKS:
            babi.find_task(stories, task)
    tokens = list(dict.fromkeys(parse_length(length) for length in lengths))
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
    if data is None and not isinstance(haystack, Haystack):
        check_source(haystack)
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"out={os.fspath(out)!r} is a file; name a folder")
    return list(itertools.product(dict.fromkeys(tasks), tokens))


# What says how samples are composed, and what it is by default.
_COMPOSING = {
    "haystack": "builtin",
    "stories": "generated",
    "position": (0.0, 1.0),
    "distance": None,
    "composition": "exact",
    "split": "eval",
    "seed": 0,
}


def _check_placed(
    plan: Sequence[tuple[str, int]],
    rules: Composition,
    data: str | os.PathLike[str] | None,
    **composing: Any,
) -> None:
    """Refuse what would say how samples are composed where none are, or not by these rules."""
    if data is not None:
        for name, value in composing.items():
            if value != _COMPOSING[name]:
                raise ValueError(
                    f"{name}={value!r} says how samples are composed, but data={os.fspath(data)!r} "
                    "brings them ready-made; leave one of the two out"
                )
        return
    if isinstance(composing["haystack"], Haystack) and composing["split"] != _COMPOSING["split"]:
        raise ValueError(
            f"split={composing['split']!r} chooses a part of a source, but haystack is a Haystack, "
            "whose part is chosen already; leave split out, or name the source"
        )
    for task, length in plan:
        if rules.name == "published" and task not in babi.TASKS:
            raise ValueError(
                f"composition='published' is of bAbI's tasks, and {task!r} is none; evaluate it apart"
            )
        rules.room(length)


def _config(model: Any, name: str, default: Any) -> Any:
    return getattr(model.config, name, default) if is_memory_model(model) else default


def _prompts(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str | os.PathLike[str] | None
) -> Prompts:
    if prompt is None:
        chats = getattr(tokenizer, "chat_template", None) is not None
        prompt = "answer" if is_memory_model(model) else "chat" if chats else "instruction"
    template = _config(model, "question_template", QUESTION_TEMPLATE)
    # A model of memlm has been trained on documents without a start token.
    bare = is_memory_model(model) and prompt == "answer"
    return Prompts.of(prompt, tokenizer, template, bare)


def _check_log(log: RunLog, source: Source, counts: dict[tuple[str, int], int]) -> None:
    """Refuse to go on with rows that are about other samples."""
    for (task, length), count in counts.items():
        for index in range(count):
            row = log.rows.get((task, format_length(length), index))
            if row is not None and not source.holds(row):
                raise ValueError(
                    f"out holds a run on other data: its sample {index} of {task} at "
                    f"{format_length(length)} asks {row['question']!r}; use another folder"
                )


@dataclass(frozen=True)
class _Batch:
    task: str
    length: int
    indices: range

    @property
    def cell(self) -> tuple[str, str]:
        return self.task, format_length(self.length)

    def keys(self) -> Iterator[tuple[str, str, int]]:
        return ((*self.cell, index) for index in self.indices)

    @property
    def cost(self) -> int:
        """Tokens to be read, for the progress bar; questions and answers take time as well."""
        return (self.length + 256) * len(self.indices)


@dataclass(frozen=True)
class _Begin:
    """What comes before the pieces of a batch. refused: why none come."""

    batch: _Batch
    asked: list[Asked]
    refused: str | None


class _Runner:
    """Runs batches of samples through the model, made ready in a thread."""

    def __init__(
        self,
        reader: Reader,
        source: Source,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        recall: _Recall | None = None,
    ) -> None:
        self.recall = recall
        self.reader = reader
        self.source = source
        self.prompts = prompts
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        self._encoded: dict[tuple[Part, ...], NDArray[np.int32]] = {}
        bare = prompts.bare or prompts.style == "chat"
        self._leading = np.array([] if bare else leading_tokens(tokenizer), dtype=np.int32)

    def run(self, todo: Sequence[_Batch], log: RunLog, bar: tqdm) -> dict[str, dict[str, str]]:
        """Answer what is to do; returns the cells that cannot be answered, with the reason."""
        skipped: dict[str, dict[str, str]] = {}
        if not todo:
            return skipped
        # The first batch may have been half read when the run was broken off.
        kept = self.reader.resume(self.ask(todo[0]))
        made = self._make(todo, 0 if kept is None else kept.done)
        with Feed(
            made, AHEAD, lambda item: item.ids.size if isinstance(item, Piece) else 0
        ) as feed:
            for batch in todo:
                clock = _Clock(feed)
                begin = next(feed)
                assert isinstance(begin, _Begin) and begin.batch is batch
                task, length = batch.cell
                bar.set_postfix_str(f"{task} {length}", refresh=False)
                aim = bar.n + batch.cost
                pieces = iter(()) if begin.refused else _until_last(feed)
                reason = begin.refused or skipped.get(task, {}).get(length)
                if reason is None:
                    try:
                        rows = self._answer(begin, pieces, clock, bar, kept)
                        # What was there already came of the same batch.
                        log.append([row for row in rows if not log.has(task, length, row["index"])])
                    except TooLong as error:
                        reason = str(error)
                for _ in pieces:
                    pass
                if reason is not None:
                    skipped.setdefault(task, {})[length] = reason
                bar.update(aim - bar.n)
                kept = None
        return skipped

    def ask(self, batch: _Batch) -> list[Asked]:
        """The samples of a batch, with what stands around their documents."""
        asked = []
        for index in batch.indices:
            sample = self.source.get(batch.task, batch.length, index)
            before, after = self.prompts.parts(batch.task, sample.question, self.tokenizer)
            behind = self._encode(after)
            passages: tuple[Recalled, ...] = ()
            if self.recall is not None:
                passages, shown = self.recall(sample)
                recalled = np.array(encode_parts(self.tokenizer, shown), dtype=np.int32)
                behind = np.concatenate([recalled, behind])
            start = np.concatenate([self._leading, self._encode([(before, True)])])
            asked.append(Asked(sample, start, behind, passages))
        return asked

    def _make(self, todo: Sequence[_Batch], done: int) -> Iterator[_Begin | Piece]:
        """All batches and their pieces, of the first one those behind the first `done`."""
        for batch in todo:
            asked = self.ask(batch)
            longest = max(one.tokens for one in asked)
            refused = self.reader.refuse(longest, self._answer_tokens(batch.task))
            yield _Begin(batch, asked, refused)
            if refused is None:
                yield from self.reader.pieces(asked, done)
            done = 0

    def _answer(
        self,
        begin: _Begin,
        pieces: Iterator[Piece],
        clock: _Clock,
        bar: tqdm,
        kept: Kept | None,
    ) -> list[Row]:
        import torch

        batch = begin.batch
        task, length = batch.cell
        with _PeakMemory(self.reader.device) as peak, torch.no_grad():
            outputs = self.reader.answer(
                begin.asked, pieces, self._answer_tokens(task), bar.update, kept
            )
        seconds, waited = clock.read()
        mark = find_task(task).mark
        rows = []
        for index, asked, output in zip(batch.indices, begin.asked, outputs, strict=True):
            sample = asked.sample
            score = mark(output, sample.target, sample.question)
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "index": index,
                    "question": sample.question,
                    "target": sample.target,
                    "output": output,
                    "correct": score.correct,
                    "exact": score.exact,
                    "published": score.published,
                    "tokens": sample.tokens,
                    "seconds": seconds / len(outputs),
                    "data_seconds": waited / len(outputs),
                    "peak_memory_bytes": peak.bytes,
                    "fact_offsets": list(sample.fact_offsets),
                    "supporting": list(sample.story.supporting),
                    **_recalled_of(asked),
                }
            )
        return rows

    def _answer_tokens(self, task: str) -> int:
        return max(self.max_new_tokens, find_task(task).answer_tokens)

    def _encode(self, parts: Iterable[Part]) -> NDArray[np.int32]:
        key = tuple(parts)
        if key not in self._encoded:
            if len(self._encoded) > MEMO:
                self._encoded.clear()
            self._encoded[key] = np.array(encode_parts(self.tokenizer, key), dtype=np.int32)
        return self._encoded[key]


@dataclass(frozen=True)
class _Recall:
    """Recalls passages of a sample's document, indexed for itself alone."""

    config: RetrievalConfig
    embedder: Embedder
    template: str

    def __call__(self, sample: Sampled) -> tuple[tuple[Recalled, ...], list[Part]]:
        """The passages, and the parts of the text that shows them."""
        passages = read_document(sample, self.embedder, self.config).recall(sample.question)
        return tuple(passages), render_parts(passages, self.template)

    def settings(self) -> dict[str, Any]:
        return {
            "retrieval": asdict(self.config),
            "embedder": self.embedder.fingerprint,
            "recall_template": self.template,
        }


def _recalled_of(asked: Asked) -> dict[str, Any]:
    """Where the recalled passages stand, and which share of the supporting facts is in them."""
    if not asked.recalled:
        return {}
    story = asked.sample.story
    told = " ".join(" ".join(passage.text.split()) for passage in asked.recalled)
    found = [story.facts[index] in told for index in story.supporting]
    return {
        "recalled": [[passage.start, passage.end] for passage in asked.recalled],
        "supporting_recalled": sum(found) / len(found) if found else None,
    }


class _Clock:
    """The seconds since it was made, and those of them spent waiting for data."""

    def __init__(self, feed: Feed[Any]) -> None:
        self._feed = feed
        self._began, self._waited = time.perf_counter(), feed.waited

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._began, self._feed.waited - self._waited


def _until_last(feed: Feed[Any]) -> Iterator[Piece]:
    """The pieces of one batch."""
    for piece in feed:
        yield piece
        if piece.last:
            return


def _batches(task: str, length: int, samples: int, batch_size: int) -> Iterator[_Batch]:
    for start in range(0, samples, batch_size):
        yield _Batch(task, length, range(start, min(start + batch_size, samples)))


class _PeakMemory:
    """The most memory in use meanwhile: of the GPU where the model is on one, else resident."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._stop = threading.Event()
        self._poll = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._poll.start()
        return self

    def __exit__(self, *exception: object) -> None:
        import torch

        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
        else:
            self._stop.set()
            self._poll.join()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._stop.wait(MEMORY_POLL_SECONDS):
                self.bytes = max(self.bytes, process.memory_info().rss)
                return


def _bar(todo: Sequence[_Batch], progress: bool) -> tqdm:
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
    """What this call asked for, and behind it what the folder holds of earlier calls.

    A cell that was given up half-way is no result.
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
    )
