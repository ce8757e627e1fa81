"""Baselines that forget nothing, or know what to keep.

They show how many of a memory's errors come from forgetting: a model that reads chunks one by one cannot
forget, one that reads a document twice knows its end the second time, and one that knows the question
knows what to keep. What an index recalls is read again, or in place of the document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from memlm.eval.running.readers import (
    Answers,
    Asked,
    BatchPiece,
    Kept,
    LastReader,
    MemoryReader,
    Tape,
)


class ChunksReader(LastReader):
    """Baseline "chunks": every chunk is asked by itself, and the surest answers (OPRM).

    The base model sees a chunk of the document and the question, one chunk after the other; the answer is
    that of the chunk after which the distribution of the answer's first token has the least entropy
    (Ben-Kish et al. 2025, *Overflow Prevention Enhances Long-Context Recurrent LLMs*). Facts in different
    chunks never meet, and a fact that a border cuts is lost.

    window: tokens it sees, prompt and question included.
    """

    name: ClassVar[str] = "chunks"

    def pieces(self, batch: Sequence[Asked], done: int = 0) -> Iterator[BatchPiece]:
        sizes = [max(1, self.window - len(one.before) - len(one.after)) for one in batch]
        tapes = [Tape(one.sample.ids()) for one in batch]
        left = [one.sample.tokens for one in batch]
        chunks = max(-(-tokens // size) for tokens, size in zip(left, sizes, strict=True))
        for number in range(max(chunks, 1)):
            rows = []
            for index, asked in enumerate(batch):
                seen = min(sizes[index], left[index])
                left[index] -= seen
                if not seen and number:
                    # Nothing is left of this row's document.
                    rows.append(np.zeros(0, dtype=np.int64))
                    continue
                row = np.empty(len(asked.before) + seen + len(asked.after), dtype=np.int64)
                row[: len(asked.before)] = asked.before
                tapes[index].take(row[len(asked.before) : len(asked.before) + seen])
                row[len(asked.before) + seen :] = asked.after
                rows.append(row)
            prompts = self._prompts(rows)
            yield BatchPiece(prompts.ids, prompts.mask, last=number + 1 == max(chunks, 1))

    def answer(
        self,
        batch: Sequence[Asked],
        pieces: Iterator[BatchPiece],
        max_new_tokens: int,
        on_read: Callable[[int], object],
        kept: Kept | None = None,
    ) -> Answers:
        doubt = np.full(len(batch), np.inf)
        best = [np.zeros(0, dtype=np.int64)] * len(batch)
        for piece in pieces:
            assert piece.mask is not None
            there = np.flatnonzero(piece.mask.any(axis=1))
            found = self._entropy(BatchPiece(piece.ids[there], piece.mask[there]))
            for row, entropy in zip(there.tolist(), found, strict=True):
                if entropy < doubt[row]:
                    doubt[row] = entropy
                    best[row] = piece.ids[row][piece.mask[row]]
            on_read(int(piece.mask.sum()))
        return Answers(self._generate(self.base, self._prompts(best), max_new_tokens))

    def _entropy(self, piece: BatchPiece) -> list[float]:
        """Entropy (nats) of what comes first after each prompt."""
        import torch

        assert piece.mask is not None
        mask = torch.from_numpy(piece.mask.astype(np.int64)).to(self.base.device)
        out = self.base.generate(
            input_ids=torch.from_numpy(piece.ids).to(self.base.device),
            attention_mask=mask,
            max_new_tokens=1,
            do_sample=False,
            eos_token_id=self._ends(self.base),
            pad_token_id=self.pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
        shares = out.logits[0].float().log_softmax(dim=-1)
        return (-(shares.exp() * shares).sum(dim=-1)).tolist()


class TwiceReader(MemoryReader):
    """Baseline "twice": the memory model reads the document twice (Arora et al. 2024, *Just read
    twice*)."""

    name: ClassVar[str] = "twice"

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        pieces = itertools.chain(asked.ids(), asked.sample.ids())
        return pieces, len(asked.before) + 2 * asked.sample.tokens


class QuestionFirstReader(MemoryReader):
    """Baseline "question-first": the memory model reads the question before the document, and after it."""

    name: ClassVar[str] = "question-first"

    def texts_of(self, batch: Sequence[Asked]) -> list[int]:
        # What is read begins with the question.
        return list(range(len(batch)))

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        pieces = itertools.chain([asked.before, asked.after], asked.sample.ids())
        return pieces, len(asked.before) + len(asked.after) + asked.sample.tokens


class PassagesReader(MemoryReader):
    """Baseline "passages": the memory model reads what an index recalls, in order, and nothing else.

    They are a document of their own, of any number of passages, where "retrieval" shows them in the
    question's segment. So this tells what recall loses with a reader that is as good as the memory.
    """

    name: ClassVar[str] = "passages"

    def texts_of(self, batch: Sequence[Asked]) -> list[int]:
        # Every question recalls passages of its own.
        return list(range(len(batch)))

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        return iter([asked.before, asked.after[: asked.shown]]), len(asked.before) + asked.shown

    def question(self, asked: Asked) -> NDArray[np.int32]:
        return asked.after[asked.shown :]


class RereadReader(PassagesReader):
    """Baseline "reread": the memory model reads the document, then what an index recalls of it."""

    name: ClassVar[str] = "reread"

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        pieces = itertools.chain(asked.ids(), [asked.after[: asked.shown]])
        return pieces, len(asked.before) + asked.sample.tokens + asked.shown
