"""Batches of samples run through the model: prepared in a thread, read, answered and scored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memlm.eval.log import Row, RunLog
from memlm.eval.running.feed import Feed
from memlm.eval.running.meters import Clock, PeakMemory
from memlm.eval.running.prompts import Prompts
from memlm.eval.running.readers import Asked, BatchPiece, BatchReader, Kept, TooLong
from memlm.eval.running.samples import Sampled, SampleSource
from memlm.retrieval.retriever import Recalled, RetrievalConfig, read_document, render_parts
from memlm.tasks.lengths import format_length
from memlm.tokens import Part, encode_parts, leading_tokens

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

    from memlm.retrieval.base import Embedder

# Tokens prepared in a thread before the model needs them.
AHEAD = 2**20
# How many encoded prompts are remembered.
MEMO = 10_000


@dataclass(frozen=True)
class Batch:
    """Samples of one cell that are read side by side: `indices` of `task` at `length` tokens."""

    task: str
    length: int
    indices: range

    @property
    def cell(self) -> tuple[str, str]:
        """The task, and the length in its written form."""
        return self.task, format_length(self.length)

    def keys(self) -> Iterator[tuple[str, str, int]]:
        """The keys of its samples' rows in the log."""
        return ((*self.cell, index) for index in self.indices)

    @property
    def cost(self) -> int:
        """Tokens to be read, for the progress bar; questions and answers take time as well."""
        return (self.length + 256) * len(self.indices)


@dataclass(frozen=True)
class _Begin:
    """Announces the pieces of a batch. refused: why none follow."""

    batch: Batch
    asked: list[Asked]
    refused: str | None


def split_into_batches(task: str, length: int, samples: int, batch_size: int) -> Iterator[Batch]:
    for start in range(0, samples, batch_size):
        yield Batch(task, length, range(start, min(start + batch_size, samples)))


class BatchRunner:
    """Runs batches of samples through the model, preparing them in a thread."""

    def __init__(
        self,
        reader: BatchReader,
        source: SampleSource,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        recall: Recall | None = None,
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

    def run(self, todo: Sequence[Batch], log: RunLog, bar: tqdm) -> dict[str, dict[str, str]]:
        """Answer the batches in `todo`; return the cells that cannot be answered, with the reason."""
        skipped: dict[str, dict[str, str]] = {}
        if not todo:
            return skipped
        # The first batch may have been half read when the run was broken off.
        kept = self.reader.resume(self.ask(todo[0]))
        made = self._make(todo, 0 if kept is None else kept.done)
        with Feed(
            made, AHEAD, lambda item: item.ids.size if isinstance(item, BatchPiece) else 0
        ) as feed:
            for batch in todo:
                clock = Clock(feed)
                begin = next(feed)
                assert isinstance(begin, _Begin) and begin.batch is batch
                task, length = batch.cell
                bar.set_postfix_str(f"{task} {length}", refresh=False)
                aim = bar.n + batch.cost
                pieces = iter(()) if begin.refused else _pieces_of_batch(feed)
                reason = begin.refused or skipped.get(task, {}).get(length)
                if reason is None:
                    try:
                        rows = self._answer(begin, pieces, clock, bar, kept)
                        # Samples logged already came from the same batch.
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

    def ask(self, batch: Batch) -> list[Asked]:
        """The samples of a batch, with the prompts around their documents."""
        asked = []
        for index in batch.indices:
            sample = self.source.get(batch.task, batch.length, index)
            before, after = self.prompts.parts(batch.task, sample.question, self.tokenizer)
            after_ids = self._encode(after)
            passages: tuple[Recalled, ...] = ()
            recalled = np.zeros(0, dtype=np.int32)
            if self.recall is not None:
                passages, shown = self.recall(sample)
                recalled = np.array(encode_parts(self.tokenizer, shown), dtype=np.int32)
                after_ids = np.concatenate([recalled, after_ids])
            start = np.concatenate([self._leading, self._encode([(before, True)])])
            document = self.source.document(batch.task, batch.length, index)
            asked.append(Asked(sample, start, after_ids, passages, document, len(recalled)))
        return asked

    def _make(self, todo: Sequence[Batch], done: int) -> Iterator[_Begin | BatchPiece]:
        """All batches and their pieces, leaving out the first `done` pieces of the first batch."""
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
        pieces: Iterator[BatchPiece],
        clock: Clock,
        bar: tqdm,
        kept: Kept | None,
    ) -> list[Row]:
        import torch

        batch = begin.batch
        task, length = batch.cell
        with PeakMemory(self.reader.device) as peak, torch.no_grad():
            outputs, writes = self.reader.answer(
                begin.asked, pieces, self._answer_tokens(task), bar.update, kept
            )
        seconds, waited = clock.read()
        mark = self.source.task(task).mark
        rows = []
        counts = [{}] * len(outputs) if writes is None else [{"writes": count} for count in writes]
        for index, asked, output, written in zip(
            batch.indices, begin.asked, outputs, counts, strict=True
        ):
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
                    **({} if score.f1 is None else {"f1": score.f1}),
                    **written,
                    **_recalled_of(asked),
                }
            )
        return rows

    def _answer_tokens(self, task: str) -> int:
        return max(self.max_new_tokens, self.source.task(task).answer_tokens)

    def _encode(self, parts: Iterable[Part]) -> NDArray[np.int32]:
        key = tuple(parts)
        if key not in self._encoded:
            if len(self._encoded) > MEMO:
                self._encoded.clear()
            self._encoded[key] = np.array(encode_parts(self.tokenizer, key), dtype=np.int32)
        return self._encoded[key]


def _pieces_of_batch(feed: Feed[Any]) -> Iterator[BatchPiece]:
    """The pieces of one batch."""
    for piece in feed:
        yield piece
        if piece.last:
            return


@dataclass(frozen=True)
class Recall:
    """Recalls passages of a sample's document, each document in a separate index."""

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
    """Where the recalled passages stand, and what share of the supporting facts is in them."""
    if not asked.recalled:
        return {}
    story = asked.sample.story
    told = " ".join(" ".join(passage.text.split()) for passage in asked.recalled)
    found = [story.facts[index] in told for index in story.supporting]
    return {
        "recalled": [[passage.start, passage.end] for passage in asked.recalled],
        "supporting_recalled": sum(found) / len(found) if found else None,
    }
