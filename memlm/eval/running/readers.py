"""How a model is given a document and a question: streamed into its memory, or as a baseline reads it.

A reader works in two halves. `pieces` makes arrays of token ids from samples, in a thread that runs before
the model; `answer` runs the model over them. So a sample is held whole only where its reader needs that.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

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

Tokens = NDArray[np.int64]


class TooLong(Exception):
    """A document that a baseline cannot take; says why."""


@dataclass(frozen=True)
class Asked:
    """One sample as a model sees it: ids before the document, the document, ids after it.

    recalled: passages whose text is part of `after`, its first `shown` ids. document: equal where the same
    text is asked about; None for a text of its own.
    """

    sample: Sampled
    before: NDArray[np.int32]
    after: NDArray[np.int32]
    recalled: tuple[Recalled, ...] = ()
    document: Hashable = None
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
    """Tokens of a batch side by side: ids (B, T), mask (B, T) bool, None when all are real.

    last: these are the prompts to continue, padded on the left; otherwise a segment, padded on the right.
    """

    ids: Tokens
    mask: NDArray[np.bool_] | None
    last: bool = False


@dataclass(frozen=True)
class Kept:
    """A batch read in part: the state after its first `done` pieces, and the writes counted so far."""

    state: MemoryState
    done: int
    writes: list[int] | None = None


class Answers(NamedTuple):
    """What was said, row by row, and in how many segments of each row a write gate opened; None without
    gates."""

    texts: list[str]
    writes: list[int] | None = None


@dataclass
class Tape:
    """A sample's tokens, taken in order, any number at a time."""

    pieces: Iterator[NDArray[np.int32]]
    rest: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def take(self, into: Tokens) -> None:
        """Fill `into` with the next tokens, which must be there."""
        filled = 0
        while filled < len(into):
            if not len(self.rest):
                self.rest = next(self.pieces)
            piece = self.rest[: len(into) - filled]
            into[filled : filled + len(piece)] = piece
            filled += len(piece)
            self.rest = self.rest[len(piece) :]

    def skip(self, count: int) -> None:
        while count > 0:
            if not len(self.rest):
                self.rest = next(self.pieces)
            passed = min(count, len(self.rest))
            self.rest = self.rest[passed:]
            count -= passed


class BatchReader(ABC):
    """Reads the samples of a batch and answers their questions."""

    name: ClassVar[str]

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

    def resume(self, batch: Sequence[Asked]) -> Kept | None:
        """What was kept when the reading of this same batch was broken off."""
        return None

    def close(self) -> None:
        """Hand the model back as it was given."""
        return None

    @abstractmethod
    def pieces(self, batch: Sequence[Asked], done: int = 0) -> Iterator[BatchPiece]:
        """Make a batch's arrays, the first `done` left out. Runs in a thread: no model, no torch."""

    @abstractmethod
    def answer(
        self,
        batch: Sequence[Asked],
        pieces: Iterator[BatchPiece],
        max_new_tokens: int,
        on_read: Callable[[int], object],
        kept: Kept | None = None,
    ) -> Answers:
        """Run the model over the pieces of one batch. TooLong when memory runs out."""

    def _generate(
        self, model: Any, piece: BatchPiece, max_new_tokens: int, **kwargs: Any
    ) -> list[str]:
        """Continue prompts greedily; return what was said up to the first end token."""
        import torch

        mask = np.ones(piece.ids.shape, dtype=bool) if piece.mask is None else piece.mask
        ends = self._ends(model)
        said = model.generate(
            input_ids=torch.from_numpy(piece.ids).to(model.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=self.pad,
            **kwargs,
        )
        outputs = []
        for row in said[:, piece.ids.shape[1] :].tolist():
            tokens = list(itertools.takewhile(lambda token: token not in ends, row))
            outputs.append(self.tokenizer.decode(tokens, skip_special_tokens=True).strip())
        return outputs

    def _ends(self, model: Any) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and those the model names for its turn."""
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        named = [] if named is None else named if isinstance(named, list) else [named]
        return sorted({int(self.tokenizer.eos_token_id), *map(int, named)})

    def _prompts(self, rows: Sequence[Tokens]) -> BatchPiece:
        return BatchPiece(*pad_rows(rows, self.pad, left=True), last=True)


class MemoryReader(BatchReader):
    """Reads all whole segments into the model's memory, then the open rest with the question.

    own_segment: the model was trained to be asked in a segment that holds only the question, so the rest is
    read into its memory, too. keep_at: a file where the state of an unfinished document is saved now and
    then, so that a run that was killed goes on in the middle of it.
    """

    name: ClassVar[str] = "memory"

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

    def resume(self, batch: Sequence[Asked]) -> Kept | None:
        from memlm.state import MemoryState

        if self._file is None or not self._file.is_file():
            return None
        try:
            state, extra = MemoryState.load_with_extra(self._file)
            if extra["batch"] != _identity_of(batch):
                return None
            writes, done = parse_json(extra.get("writes", "null")), int(extra["segments"])
            counts = writes is None or (
                isinstance(writes, list)
                and len(writes) == state.batch_size
                and all(isinstance(count, int) for count in writes)
            )
            return Kept(state, done, writes) if counts and done >= 0 else None
        except (ValueError, KeyError):
            # Only time is lost: the batch is read from its start.
            return None

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        """What is read before the question, in pieces, and how many tokens it has."""
        return asked.ids(), len(asked.before) + asked.sample.tokens

    def question(self, asked: Asked) -> NDArray[np.int32]:
        """What comes after the text."""
        return asked.after

    def texts_of(self, batch: Sequence[Asked]) -> list[int]:
        """For each sample the number of the text that is read for it: one text is read once."""
        known: dict[Hashable, int] = {}
        keys = [(i,) if one.document is None else one.document for i, one in enumerate(batch)]
        return [known.setdefault(key, len(known)) for key in keys]

    def pieces(self, batch: Sequence[Asked], done: int = 0) -> Iterator[BatchPiece]:
        numbers = self.texts_of(batch)
        texts = [self.text(batch[numbers.index(number)]) for number in range(max(numbers) + 1)]
        tapes = [Tape(pieces) for pieces, _ in texts]
        read = np.array([count for _, count in texts])
        whole = read if self.own_segment else read // self.segment * self.segment
        for number, start in enumerate(range(0, int(whole.max()), self.segment)):
            sizes = np.clip(whole - start, 0, self.segment)
            if number < done:
                for tape, size in zip(tapes, sizes.tolist(), strict=True):
                    tape.skip(size)
                continue
            width = int(sizes.max())
            ids = np.full((len(tapes), width), self.pad, dtype=np.int64)
            for tape, row, size in zip(tapes, ids, sizes.tolist(), strict=True):
                tape.take(row[:size])
            real = np.arange(width)[None, :] < sizes[:, None]
            yield BatchPiece(ids, None if bool(real.all()) else real)
        rests = [np.empty(left, dtype=np.int64) for left in (read - whole).tolist()]
        for tape, rest in zip(tapes, rests, strict=True):
            tape.take(rest)
        yield self._prompts(
            [
                np.concatenate([rests[number], self.question(asked)])
                for asked, number in zip(batch, numbers, strict=True)
            ]
        )

    def answer(
        self,
        batch: Sequence[Asked],
        pieces: Iterator[BatchPiece],
        max_new_tokens: int,
        on_read: Callable[[int], object],
        kept: Kept | None = None,
    ) -> Answers:
        from memlm.scan import scan
        from memlm.writes import WriteCount

        state, done, before = (
            (None, 0, None) if kept is None else (kept.state, kept.done, kept.writes)
        )
        writes = WriteCount(before)
        last: list[BatchPiece] = []

        def segments() -> Iterator[Segment]:
            for piece in pieces:
                if piece.last:
                    last.append(piece)
                    return
                yield self._segment(piece)
                on_read(piece.ids.size if piece.mask is None else int(piece.mask.sum()))

        def read(window: list[Segment], state: MemoryState) -> tuple[None, MemoryState]:
            return None, self.model.read(window, state, writes)

        save_at = time.monotonic() + KEEP_SECONDS
        # Without a state, the model makes the first one itself.
        found = scan(read, segments(), cast("MemoryState", state), bptt_depth=1)
        for _, state in found:
            done += 1
            if self._file is not None and time.monotonic() > save_at:
                extra = {"segments": str(done), "writes": json.dumps(writes.rows())}
                state.save(self._file, {"batch": _identity_of(batch), **extra})
                save_at = time.monotonic() + KEEP_SECONDS
        (prompts,) = last
        written, numbers = writes.rows(), self.texts_of(batch)
        if max(numbers) + 1 < len(batch):
            if state is not None:
                state = state.select(numbers)
            written = None if written is None else [written[number] for number in numbers]
        outputs = self._generate(self.model, prompts, max_new_tokens, memory_state=state)
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        return Answers(outputs, written)

    def _segment(self, piece: BatchPiece) -> Segment:
        import torch

        from memlm.segment import Segment

        device = self.model.device
        mask = None if piece.mask is None else torch.from_numpy(piece.mask).to(device)
        return Segment(torch.from_numpy(piece.ids).to(device), mask)


def _identity_of(batch: Sequence[Asked]) -> str:
    """A text that tells one batch from another: tasks, questions, lengths and places of facts."""
    return json.dumps(
        [[a.sample.task, a.sample.question, a.tokens, list(a.sample.fact_offsets)] for a in batch]
    )


class BaseReader(BatchReader):
    """Reads with a model of transformers alone."""

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self.base = base

    @property
    def device(self) -> torch.device:
        return self.base.device


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

    def pieces(self, batch: Sequence[Asked], done: int = 0) -> Iterator[BatchPiece]:
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
        yield self._prompts(rows)

    def answer(
        self,
        batch: Sequence[Asked],
        pieces: Iterator[BatchPiece],
        max_new_tokens: int,
        on_read: Callable[[int], object],
        kept: Kept | None = None,
    ) -> Answers:
        (prompts,) = pieces
        return Answers(self._generate(self.base, prompts, max_new_tokens))


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

    def pieces(self, batch: Sequence[Asked], done: int = 0) -> Iterator[BatchPiece]:
        rows = []
        for asked in batch:
            row = np.empty(asked.tokens, dtype=np.int64)
            Tape(asked.ids()).take(row[: asked.tokens - len(asked.after)])
            row[asked.tokens - len(asked.after) :] = asked.after
            rows.append(row)
        yield self._prompts(rows)

    def answer(
        self,
        batch: Sequence[Asked],
        pieces: Iterator[BatchPiece],
        max_new_tokens: int,
        on_read: Callable[[int], object],
        kept: Kept | None = None,
    ) -> Answers:
        import torch

        (prompts,) = pieces
        assert prompts.mask is not None
        step = max(1, self._rows_that_fit(prompts.ids.shape[1] + max_new_tokens))
        outputs: list[str] = []
        for start in range(0, len(prompts.ids), step):
            ids, mask = prompts.ids[start : start + step], prompts.mask[start : start + step]
            # Columns that are padding in all these rows.
            empty = int(mask.any(axis=0).argmax())
            part = BatchPiece(ids[:, empty:], mask[:, empty:], last=True)
            long = {"prefill_chunk_size": PREFILL} if part.ids.shape[1] > PREFILL else {}
            try:
                outputs += self._generate(self.base, part, max_new_tokens, **long)
            except torch.OutOfMemoryError as error:
                raise TooLong(
                    f"memory ran out at {part.ids.shape[1]:,} tokens in {len(part.ids)} rows"
                ) from error
            on_read(int(mask.sum()))
        return Answers(outputs)

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
