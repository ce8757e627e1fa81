"""How a model is given a document and a question: streamed into its memory, or as a baseline reads it.

A reader works in two halves. `prepare` makes arrays of token ids from samples, in a thread that runs before
the model; `answer` runs the model over them. So a sample is held whole only where its reader needs that.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from memlm.eval.running.lanes import (
    Questions,
    Stretch,
    Tape,
    Text,
    TextName,
    Tokens,
    side_by_side,
)
from memlm.files import parse_json
from memlm.padding import pad_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from memlm.eval.running.samples import Sampled
    from memlm.modeling import MemLMForCausalLM
    from memlm.retrieval.retriever import Recalled
    from memlm.segment import Segment
    from memlm.state import MemoryState

# Seconds of reading after which the state of an unfinished document is kept.
KEEP_SECONDS = 120.0
# Tokens of a whole prompt a base model takes at once; bounds the attention's and logits' memory.
PREFILL = 2048
# The share of the free memory that a cache of keys and values may take.
FREE_SHARE = 0.7
# Segments that a memory model reads before others may join, where diagonals want no more.
AT_ONCE = 8


class TooLong(Exception):
    """A document that a baseline cannot take; says why."""


@dataclass(frozen=True)
class Asked:
    """One sample as a model sees it: ids before the document, the document, ids after it.

    key: of its row in the log (task, length, index). answer_tokens: how long an answer may be. recalled:
    passages whose text is part of `after`, its first `shown` ids. text: the name of what is read before it
    is asked.
    """

    sample: Sampled
    before: NDArray[np.int32]
    after: NDArray[np.int32]
    key: tuple[str, str, int]
    answer_tokens: int
    text: TextName
    recalled: tuple[Recalled, ...] = ()
    shown: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all three."""
        return len(self.before) + self.sample.tokens + len(self.after)

    def ids(self) -> Iterator[NDArray[np.int32]]:
        """What comes before the question, in order, in pieces."""
        return itertools.chain([self.before], self.sample.ids())


@dataclass(frozen=True)
class BatchPiece:
    """Tokens of a batch side by side: ids (B, T), mask (B, T) bool; `asked`, the samples of the batch.

    last: the whole batch is asked with these prompts, padded on the left, which are to be continued.
    """

    asked: Sequence[Asked]
    ids: Tokens
    mask: NDArray[np.bool_]
    last: bool = False

    @property
    def size(self) -> int:
        return self.ids.size


Piece = BatchPiece | Stretch | Questions


@dataclass(frozen=True)
class Kept:
    """Texts read in part, in the order of the rows of `state`: how many tokens of each, and the writes
    counted so far."""

    state: MemoryState
    done: dict[TextName, int]
    writes: dict[TextName, int]

    def only(self, names: Container[TextName]) -> Kept:
        """What was kept of these texts."""
        rows = [row for row, name in enumerate(self.done) if name in names]
        done = {name: count for name, count in self.done.items() if name in names}
        writes = {name: count for name, count in self.writes.items() if name in names}
        return Kept(self.state.select(rows), done, writes)


@dataclass(frozen=True)
class Told:
    """What a reader did with one piece: it worked on `texts`, of which it read `tokens` in all.

    asked: the samples whose answers, `outputs`, are known now. writes: in how many segments of each one's
    text a write gate opened; None where there was no gate, or nothing was read.
    """

    texts: Sequence[TextName]
    tokens: int
    asked: Sequence[Asked] = ()
    outputs: Sequence[str] = ()
    writes: Sequence[int | None] = ()


class BatchReader(ABC):
    """Reads samples and answers their questions.

    mixes: whether it takes samples of any lengths, all of a run at once, and never refuses one; otherwise
    it is given those of one cell, a batch at a time. shares_texts: whether a text is read once for all
    questions about it.
    """

    name: ClassVar[str]
    mixes: ClassVar[bool] = False
    shares_texts: ClassVar[bool] = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # Padding is masked everywhere, so any id serves where the tokenizer names none.
        pad = tokenizer.pad_token_id
        self.pad = int(tokenizer.eos_token_id if pad is None else pad)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is."""

    def settings(self) -> dict[str, Any]:
        """What decides the answers beside the model."""
        return {"baseline": self.name}

    def refuse(self, tokens: int, max_new_tokens: int) -> str | None:
        """Why a prompt of so many tokens cannot be taken; None when it can."""
        return None

    def resume(self) -> Kept | None:
        """What was kept when reading was broken off."""
        return None

    def forget(self) -> None:
        """Keep nothing: all is answered."""
        return None

    def close(self) -> None:
        """Hand the model back as it was given."""
        return None

    @abstractmethod
    def prepare(
        self, groups: Iterable[Sequence[Asked]], rows: int, kept: Kept | None
    ) -> Iterator[Piece]:
        """Make arrays from samples, those of a group being about one text. Runs in a thread: no model, no
        torch.

        rows: samples that are read side by side. kept: what need not be read again.
        """

    @abstractmethod
    def answer(
        self, pieces: Iterator[Piece], on_read: Callable[[int], object], kept: Kept | None
    ) -> Iterator[Told]:
        """Run the model over the pieces; say what was done after each. TooLong when memory runs out."""

    def _generate(
        self,
        model: Any,
        ids: Tokens,
        mask: NDArray[np.bool_],
        asked: Sequence[Asked],
        **kwargs: Any,
    ) -> list[str]:
        """Continue prompts (B, T) greedily; return what was said up to the first end token."""
        import torch

        ends = self._ends(model)
        limits = [one.answer_tokens for one in asked]
        said = model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(model.device),
            max_new_tokens=max(limits),
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self.pad,
            **kwargs,
        )
        outputs = []
        for row, limit in zip(said[:, ids.shape[1] :].tolist(), limits, strict=True):
            tokens = list(itertools.takewhile(lambda token: token not in ends, row[:limit]))
            outputs.append(self.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return outputs

    def _ends(self, model: Any) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and those the model names for its turn."""
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named = [] if named is None else named if isinstance(named, list) else [named]
        return sorted({int(self.tokenizer.eos_token_id), *map(int, named)})


class MemoryReader(BatchReader):
    """Reads all whole segments into the model's memory, then the open rest with the question.

    Texts join and leave the batch at segment borders (`memlm.eval.running.lanes`). own_segment: the model
    was trained to be asked in a segment that holds only the question, so the rest is read into its memory,
    too. keep_at: a file where the state of unfinished texts is saved now and then, so that a run that was
    killed goes on in the middle of them.
    """

    name: ClassVar[str] = "memory"
    mixes: ClassVar[bool] = True
    shares_texts: ClassVar[bool] = True

    def __init__(
        self,
        model: MemLMForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        own_segment: bool = False,
        keep_at: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(tokenizer)
        self.model = model
        self.segment = int(model.config.segment_length)
        self.own_segment = own_segment
        self._file = None if keep_at is None else Path(keep_at)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def resume(self) -> Kept | None:
        from memlm.state import MemoryState

        if self._file is None or not self._file.is_file():
            return None
        try:
            state, extra = MemoryState.load_with_extra(self._file, str(self.device))
            rows = [KeptRow(*row) for row in parse_json(extra["texts"])]
        except (ValueError, KeyError, TypeError):
            # Only time is lost: the texts are read from their start.
            return None
        counts = [n for row in rows for n in (row.done, row.writes) if n is not None]
        done = {TextName(*row[:3]): row.done for row in rows}
        if len(done) != state.batch_size or not all(isinstance(n, int) and n >= 0 for n in counts):
            return None
        written = {TextName(*row[:3]): row.writes for row in rows if row.writes is not None}
        return Kept(state, done, written)

    def forget(self) -> None:
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        """What is read before the question, in pieces, and how many tokens it has."""
        return asked.ids(), len(asked.before) + asked.sample.tokens

    def question(self, asked: Asked) -> NDArray[np.int32]:
        """What comes after the text."""
        return asked.after

    def prepare(
        self, groups: Iterable[Sequence[Asked]], rows: int, kept: Kept | None
    ) -> Iterator[Piece]:
        done = {} if kept is None else kept.done
        texts = (self._open(group, done) for group in groups)
        at_once = max(AT_ONCE, self.model.scheduler.reads_ahead())
        return side_by_side(texts, rows, self.segment, at_once, self.own_segment, self.pad)

    def _open(self, group: Sequence[Asked], done: dict[TextName, int]) -> Text:
        name = group[0].text
        pieces, tokens = self.text(group[0])
        text = Text(
            name,
            list(group),
            [self.question(asked) for asked in group],
            Tape(pieces),
            min(done.get(name, 0), tokens),
            tokens // self.segment * self.segment,
            tokens,
        )
        text.tape.skip(text.done)
        return text

    def answer(
        self, pieces: Iterator[Piece], on_read: Callable[[int], object], kept: Kept | None
    ) -> Iterator[Told]:
        from memlm.scan import scan

        batch = Mixed(self.model, kept)

        def run(window: list[Stretch | Questions], state: MemoryState) -> tuple[Told, MemoryState]:
            (piece,) = window
            if isinstance(piece, Stretch):
                segments = self._segments(piece.ids, None, on_read)
                sizes = [piece.ids.shape[1]] * len(piece.texts)
                return Told(piece.texts, piece.size), batch.read(
                    piece.texts, segments, sizes, state
                )
            read = 0
            if piece.short_ids is not None and piece.short_mask is not None:
                sizes = piece.short_mask.sum(axis=1).tolist()
                read = sum(sizes)
                segments = self._segments(piece.short_ids, piece.short_mask, on_read)
                state = batch.read(piece.short, segments, sizes, state)
            state = batch.join(piece.texts, state)
            outputs = self._generate(
                self.model,
                piece.ids,
                piece.mask,
                piece.asked,
                memory_state=batch.select(piece.texts, state),
            )
            told = Told(piece.texts, read, piece.asked, outputs, batch.writes_of(piece.texts))
            return told, batch.leave(piece.leaving, state)

        save_at = time.monotonic() + KEEP_SECONDS
        start = self.model.init_state(1).select([]) if kept is None else kept.state
        for told, state in scan(run, cast("Iterator[Stretch | Questions]", pieces), start, 1):
            if self._file is not None and time.monotonic() > save_at:
                state.save(self._file, {"texts": json.dumps(batch.table())})
                save_at = time.monotonic() + KEEP_SECONDS
            yield told

    def _segments(
        self, ids: Tokens, mask: NDArray[np.bool_] | None, on_read: Callable[[int], object]
    ) -> Iterator[Segment]:
        import torch

        from memlm.segment import cut

        device = self.model.device
        real = None if mask is None or mask.all() else torch.from_numpy(mask).to(device)
        for segment in cut(torch.from_numpy(ids).to(device), real, None, self.segment):
            yield segment
            on_read(segment.ids.numel() if mask is None else int(mask.sum()))


class KeptRow(NamedTuple):
    """A text of which a state was kept, as its file says it."""

    task: str
    length: str
    document: str
    done: int
    writes: int | None


class Mixed:
    """The texts whose memories are the rows of a state, in that order, and what is known of each."""

    def __init__(self, model: MemLMForCausalLM, kept: Kept | None) -> None:
        self.model = model
        # Tokens read of each text, in the order of the rows.
        self._done: dict[TextName, int] = {} if kept is None else dict(kept.done)
        self._writes = {} if kept is None else dict(kept.writes)

    def join(self, texts: Sequence[TextName], state: MemoryState) -> MemoryState:
        """Add a row for each text that has none."""
        new = [name for name in dict.fromkeys(texts) if name not in self._done]
        if not new:
            return state
        self._done |= dict.fromkeys(new, 0)
        return state.cat([state, self.model.init_state(len(new))])

    def read(
        self,
        texts: Sequence[TextName],
        segments: Iterator[Segment],
        sizes: Sequence[int],
        state: MemoryState,
    ) -> MemoryState:
        """Read `segments` into the rows of `texts`, which become the first: `sizes` tokens of each."""
        from memlm.writes import WriteCount

        state = self.join(texts, state)
        resting = [name for name in self._done if name not in texts]
        reading, rest = self.select(texts, state), self.select(resting, state)
        writes = WriteCount()
        state = self.model.read(segments, reading, writes)
        counts: Sequence[int | None] = writes.rows() or [None] * len(texts)
        for name, size, count in zip(texts, sizes, counts, strict=True):
            self._done[name] += size
            if count is not None:
                self._writes[name] = self._writes.get(name, 0) + count
        self._done = {name: self._done[name] for name in [*texts, *resting]}
        return state.cat([state, rest]) if resting else state

    def select(self, texts: Sequence[TextName], state: MemoryState) -> MemoryState:
        """The rows of `texts`."""
        held = list(self._done)
        return state if held == list(texts) else state.select([held.index(name) for name in texts])

    def leave(self, texts: Sequence[TextName], state: MemoryState) -> MemoryState:
        """Drop the rows of `texts`."""
        staying = [name for name in self._done if name not in texts]
        state = self.select(staying, state)
        self._done = {name: self._done[name] for name in staying}
        return state

    def writes_of(self, texts: Sequence[TextName]) -> list[int | None]:
        """Of each text the segments in which a write gate opened; None where none was there or read."""
        return [self._writes.get(name) for name in texts]

    def table(self) -> list[KeptRow]:
        """What is kept beside the state."""
        return [KeptRow(*name, done, self._writes.get(name)) for name, done in self._done.items()]


class BaseReader(BatchReader):
    """Reads with a model of transformers alone."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.base = base

    @property
    def device(self) -> torch.device:
        return self.base.device

    @abstractmethod
    def pieces(self, batch: Sequence[Asked]) -> Iterator[BatchPiece]:
        """The arrays of one batch."""

    def prepare(
        self, groups: Iterable[Sequence[Asked]], rows: int, kept: Kept | None
    ) -> Iterator[Piece]:
        yield from self.pieces([asked for group in groups for asked in group])

    def answer(
        self, pieces: Iterator[Piece], on_read: Callable[[int], object], kept: Kept | None
    ) -> Iterator[Told]:
        for asked, outputs in self.said(cast("Iterator[BatchPiece]", pieces), on_read):
            yield Told([one.text for one in asked], 0, asked, outputs, [None] * len(asked))

    @abstractmethod
    def said(
        self, pieces: Iterator[BatchPiece], on_read: Callable[[int], object]
    ) -> Iterator[tuple[Sequence[Asked], list[str]]]:
        """Run the model over the pieces of one batch, and say what it answered."""

    def _prompts(self, batch: Sequence[Asked], rows: Sequence[Tokens]) -> BatchPiece:
        return BatchPiece(batch, *pad_rows(rows, self.pad, left=True), last=True)


class LastReader(BaseReader):
    """Baseline "last-tokens": the base model sees the end of the document alone, and the question.

    window: tokens it sees, prompt and question included.
    """

    name: ClassVar[str] = "last-tokens"

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: int
    ) -> None:
        super().__init__(base, tokenizer)
        self.window = window

    def settings(self) -> dict[str, Any]:
        return {"baseline": self.name, "window": self.window}

    def pieces(self, batch: Sequence[Asked]) -> Iterator[BatchPiece]:
        rows = []
        for asked in batch:
            around = len(asked.before) + len(asked.after)
            seen = min(asked.sample.tokens, max(0, self.window - around))
            row = np.empty(around + seen, dtype=np.int64)
            row[: len(asked.before)] = asked.before
            tape = Tape(asked.sample.ids())
            tape.skip(asked.sample.tokens - seen)
            tape.take(row[len(asked.before) : len(asked.before) + seen])
            row[len(asked.before) + seen :] = asked.after
            rows.append(row)
        yield self._prompts(batch, rows)

    def said(
        self, pieces: Iterator[BatchPiece], on_read: Callable[[int], object]
    ) -> Iterator[tuple[Sequence[Asked], list[str]]]:
        (piece,) = pieces
        yield piece.asked, self._generate(self.base, piece.ids, piece.mask, piece.asked)


class RecalledReader(LastReader):
    """Baseline "retrieval": the base model sees the recalled passages and the question alone."""

    name: ClassVar[str] = "retrieval"

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(base, tokenizer, window=0)

    def settings(self) -> dict[str, Any]:
        return {"baseline": self.name}


class WholeReader(BaseReader):
    """Baseline "full": the base model attends to the whole document, up to its limit or the machine's."""

    name: ClassVar[str] = "full"

    def refuse(self, tokens: int, max_new_tokens: int) -> str | None:
        config = self.base.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        needed = tokens + max_new_tokens
        if limit is not None and needed > limit:
            return f"{needed:,} tokens are more than the model's {limit:,} positions"
        if self._rows_that_fit(needed) < 1:
            return (
                f"the keys and values of {needed:,} tokens take "
                f"{needed * self._bytes_per_token() / 2**30:,.1f} GiB, more than is free"
            )
        return None

    def pieces(self, batch: Sequence[Asked]) -> Iterator[BatchPiece]:
        rows = []
        for asked in batch:
            row = np.empty(asked.tokens, dtype=np.int64)
            Tape(asked.ids()).take(row[: asked.tokens - len(asked.after)])
            row[asked.tokens - len(asked.after) :] = asked.after
            rows.append(row)
        yield self._prompts(batch, rows)

    def said(
        self, pieces: Iterator[BatchPiece], on_read: Callable[[int], object]
    ) -> Iterator[tuple[Sequence[Asked], list[str]]]:
        import torch

        (prompts,) = pieces
        longest = max(one.answer_tokens for one in prompts.asked)
        step = max(1, self._rows_that_fit(prompts.ids.shape[1] + longest))
        outputs: list[str] = []
        for start in range(0, len(prompts.ids), step):
            part = slice(start, start + step)
            mask = prompts.mask[part]
            # Columns that are padding in all these rows.
            empty = int(mask.any(axis=0).argmax())
            ids, real = prompts.ids[part, empty:], mask[:, empty:]
            long = {"prefill_chunk_size": PREFILL} if ids.shape[1] > PREFILL else {}
            try:
                outputs += self._generate(self.base, ids, real, prompts.asked[part], **long)
            except torch.OutOfMemoryError as error:
                raise TooLong(
                    f"memory ran out at {ids.shape[1]:,} tokens in {len(ids)} rows"
                ) from error
            on_read(int(mask.sum()))
        yield prompts.asked, outputs

    def _bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        config = self.base.config.get_text_config()
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * config.num_hidden_layers * groups * size * self.base.dtype.itemsize

    def _rows_that_fit(self, tokens: int) -> int:
        import psutil
        import torch

        device = self.base.device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
        else:
            free = psutil.virtual_memory().available
        return int(FREE_SHARE * free // (tokens * self._bytes_per_token()))
