"""Batches of samples run through the model: prepared in a thread, read, answered and scored."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memlm.eval.log import Row, RunLog
from memlm.eval.running.feed import Feed
from memlm.eval.running.lanes import TextName
from memlm.eval.running.meters import Clock, PeakMemory
from memlm.eval.running.prompts import Prompts
from memlm.eval.running.readers import Asked, BatchReader, Kept, Piece, TooLong
from memlm.eval.running.samples import Sampled, SampleSource
from memlm.retrieval.retriever import Recalled, RetrievalConfig, read_document, render_parts
from memlm.tasks.lengths import format_length, parse_length
from memlm.tokens import Part, encode_parts, leading_tokens

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

    from memlm.retrieval.base import Embedder

# Tokens prepared in a thread before the model needs them.
AHEAD = 2**20
# How many encoded prompts are remembered.
MEMO = 10_000


Key = tuple[str, str, int]


@dataclass(frozen=True)
class Batch:
    """Samples that a reader is given together: groups of those asked about one text, by their keys in the
    log (task, length, index).
    """

    groups: tuple[tuple[Key, ...], ...]

    @property
    def keys(self) -> list[Key]:
        return [key for group in self.groups for key in group]

    @property
    def cost(self) -> int:
        """Tokens to be read, for the progress bar; questions and answers take time as well."""
        return sum(map(_cost, self.keys))


def _cost(key: Key) -> int:
    return parse_length(key[1]) + 256


@dataclass(frozen=True)
class _Begin:
    """Announces the pieces of a batch. refused: why none follow."""

    batch: Batch
    refused: str | None
    size = 0


@dataclass(frozen=True)
class _End:
    """No piece of the batch follows."""

    size = 0


@dataclass
class _Spent:
    """What went into a text so far: seconds, those of them spent waiting for data, tokens, and the most
    memory in use meanwhile."""

    seconds: float = 0.0
    waited: float = 0.0
    tokens: int = 0
    peak: int = 0


def split_into_batches(
    counts: Mapping[tuple[str, int], int], batch_size: int, log: RunLog
) -> list[Batch]:
    """Batches of the samples of one cell each, without those of which all are in the log.

    The same batches whatever is in the log: so a run that was broken off repeats itself to the bit.
    """
    batches = []
    for (task, length), count in counts.items():
        keys = [(task, format_length(length), index) for index in range(count)]
        for start in range(0, count, batch_size):
            chosen = keys[start : start + batch_size]
            if not all(log.has(*key) for key in chosen):
                batches.append(Batch(tuple((key,) for key in chosen)))
    return batches


def group_by_text(
    counts: Mapping[tuple[str, int], int], source: SampleSource, shares_texts: bool, log: RunLog
) -> list[Batch]:
    """A batch for each text, of the samples that are not in the log; the longest texts first.

    Long ones, begun late, would be read alone at the end.
    """
    groups: dict[Hashable, list[Key]] = {}
    # Sorting keeps the order among cells of one length.
    for (task, length), count in sorted(counts.items(), key=lambda cell: -cell[0][1]):
        for index in range(count):
            key = (task, format_length(length), index)
            if not log.has(*key):
                shared = source.document(task, length, index) if shares_texts else index
                groups.setdefault((task, length, shared), []).append(key)
    return [Batch((tuple(group),)) for group in groups.values()]


def joined(batches: Sequence[Batch]) -> list[Batch]:
    """One batch of all the samples; none of none."""
    groups = [group for batch in batches for group in batch.groups]
    return [Batch(tuple(groups))] if groups else []


class BatchRunner:
    """Runs batches of samples through the model, preparing them in a thread."""

    def __init__(
        self,
        reader: BatchReader,
        source: SampleSource,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        max_new_tokens: int,
        rows: int,
        recall: Recall | None = None,
    ) -> None:
        """rows: samples that are read side by side."""
        self.rows = rows
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
        kept = self.reader.resume()
        if todo and kept is not None:
            todo, kept = self._go_on(todo, kept)
        with Feed(self._make(todo, kept), AHEAD, lambda item: item.size) as feed:
            for batch in todo:
                clock = Clock(feed)
                begin = next(feed)
                assert isinstance(begin, _Begin) and begin.batch is batch
                task, length, _ = batch.keys[0]
                bar.set_postfix_str(f"{task} {length}", refresh=False)
                aim = bar.n + batch.cost
                pieces = _pieces_of_batch(feed)
                reason = begin.refused or skipped.get(task, {}).get(length)
                if reason is None:
                    try:
                        self._answer(pieces, clock, log, bar, kept)
                    except TooLong as error:
                        reason = str(error)
                for _ in pieces:
                    pass
                if reason is not None:
                    # Only readers that are given one cell at a time refuse.
                    skipped.setdefault(task, {})[length] = reason
                bar.update(aim - bar.n)
                kept = None
        self.reader.forget()
        return skipped

    def _go_on(self, todo: Sequence[Batch], kept: Kept) -> tuple[list[Batch], Kept]:
        """What is left to do, the texts that were half read first, and what was kept of these."""
        (batch,) = todo
        places = {name: place for place, name in enumerate(kept.done)}
        names = [self._name_of(group[0]) for group in batch.groups]
        order = sorted(range(len(names)), key=lambda n: places.get(names[n], len(places)))
        groups = tuple(batch.groups[number] for number in order)
        return [Batch(groups)], kept.only(set(names))

    def _name_of(self, key: Key) -> TextName:
        task, length, index = key
        shared = self.reader.shares_texts
        document = self.source.document(task, parse_length(length), index) if shared else index
        return TextName(task, length, str(document))

    def ask(self, key: Key) -> Asked:
        """A sample, with the prompts around its document."""
        task, length, index = key
        sample = self.source.get(task, parse_length(length), index)
        before, after = self.prompts.parts(task, sample.question, self.tokenizer)
        after_ids = self._encode(after)
        passages: tuple[Recalled, ...] = ()
        recalled = np.zeros(0, dtype=np.int32)
        if self.recall is not None:
            passages, shown = self.recall(sample)
            recalled = np.array(encode_parts(self.tokenizer, shown), dtype=np.int32)
            after_ids = np.concatenate([recalled, after_ids])
        start = np.concatenate([self._leading, self._encode([(before, True)])])
        return Asked(
            sample,
            start,
            after_ids,
            key,
            max(self.max_new_tokens, self.source.task(task).answer_tokens),
            self._name_of(key),
            passages,
            len(recalled),
        )

    def _make(self, todo: Sequence[Batch], kept: Kept | None) -> Iterator[_Begin | Piece | _End]:
        """All batches and their pieces."""
        for batch in todo:
            groups: Iterable[list[Asked]] = ([self.ask(k) for k in group] for group in batch.groups)
            refused = None
            if not self.reader.mixes:
                groups = list(groups)
                asked = [one for group in groups for one in group]
                longest = max(one.tokens for one in asked)
                refused = self.reader.refuse(longest, max(one.answer_tokens for one in asked))
            yield _Begin(batch, refused)
            if refused is None:
                yield from self.reader.prepare(groups, self.rows, kept)
            yield _End()
            kept = None

    def _answer(
        self, pieces: Iterator[Piece], clock: Clock, log: RunLog, bar: tqdm, kept: Kept | None
    ) -> None:
        """Run the reader over the pieces of a batch, and log what is answered as it comes."""
        import torch

        spent: dict[TextName, _Spent] = {}
        begun, answered = bar.n, 0
        with PeakMemory(self.reader.device) as peak, torch.no_grad():
            for told in self.reader.answer(pieces, bar.update, kept):
                seconds, waited = clock.lap()
                most = peak.lap()
                for name in told.texts:
                    one = spent.setdefault(name, _Spent())
                    one.seconds += seconds / len(told.texts)
                    one.waited += waited / len(told.texts)
                    one.tokens += told.tokens // len(told.texts)
                    one.peak = max(one.peak, most)
                rows = (
                    [
                        self._row(asked, output, written, spent[name], told.texts.count(name))
                        for asked, output, written, name in zip(
                            told.asked, told.outputs, told.writes, told.texts, strict=True
                        )
                    ]
                    if told.asked
                    else []
                )
                # Of a batch that is repeated as a whole, some samples may have been logged.
                log.append([row for row in rows if not log.has(*(row[key] for key in log.keys))])
                answered += sum(_cost(asked.key) for asked in told.asked)
                for name in told.texts if told.asked else ():
                    spent.pop(name, None)
                under_way = sum(one.tokens for one in spent.values())
                bar.update(max(0, begun + answered + under_way - bar.n))

    def _row(
        self, asked: Asked, output: str, written: int | None, spent: _Spent, shared: int
    ) -> Row:
        """The row of a sample, one of `shared` that were answered together after their text was read."""
        task, length, index = asked.key
        sample = asked.sample
        score = self.source.task(task).mark(output, sample.target, sample.question)
        return {
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
            "seconds": spent.seconds / shared,
            "data_seconds": spent.waited / shared,
            "peak_memory_bytes": spent.peak,
            "fact_offsets": list(sample.fact_offsets),
            "supporting": list(sample.story.supporting),
            **({} if score.f1 is None else {"f1": score.f1}),
            **({} if written is None else {"writes": written}),
            **_recalled_of(asked),
        }

    def _encode(self, parts: Iterable[Part]) -> NDArray[np.int32]:
        key = tuple(parts)
        if key not in self._encoded:
            if len(self._encoded) > MEMO:
                self._encoded.clear()
            self._encoded[key] = np.array(encode_parts(self.tokenizer, key), dtype=np.int32)
        return self._encoded[key]


def _pieces_of_batch(feed: Feed[Any]) -> Iterator[Piece]:
    """The pieces of one batch."""
    for piece in feed:
        if isinstance(piece, _End):
            return
        yield piece


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
