"""Baselines that forget nothing, or know what to keep.

They show how many of a memory's errors come from forgetting: a model that reads chunks one by one cannot
forget, one that reads a document twice knows its end the second time, and one that knows the question
knows what to keep. What an index recalls is read again, or in place of the document.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from memlm.eval.running.lanes import Tape, Tokens
from memlm.eval.running.readers import Asked, BatchPiece, LastReader, MemoryReader


class ChunksReader(LastReader):
    """Baseline "chunks": every chunk is asked by itself, and the surest answers (OPRM).

    The base model sees a chunk of the document and the question, one chunk after the other; the answer is
    that of the chunk after which the distribution of the answer's first token has the least entropy
    (Ben-Kish et al. 2025, *Overflow Prevention Enhances Long-Context Recurrent LLMs*). Facts in different
    chunks never meet, and a fact that a border cuts is lost.

    window: tokens it sees, prompt and question included.
    """

    name: ClassVar[str] = "chunks"

    def pieces(self, batch: Sequence[Asked]) -> Iterator[BatchPiece]:
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
            prompts = self._prompts(batch, rows)
            yield replace(prompts, last=number + 1 == max(chunks, 1))

    def said(
        self, pieces: Iterator[BatchPiece], on_read: Callable[[int], object]
    ) -> Iterator[tuple[Sequence[Asked], list[str]]]:
        doubt: list[float] = []
        best: list[Tokens] = []
        asked: Sequence[Asked] = ()
        for piece in pieces:
            if not best:
                asked = piece.asked
                doubt, best = (
                    [float("inf")] * len(asked),
                    [np.zeros(0, dtype=np.int64)] * len(asked),
                )
            there = np.flatnonzero(piece.mask.any(axis=1))
            found = self._entropy(piece.ids[there], piece.mask[there])
            for row, entropy in zip(there.tolist(), found, strict=True):
                if entropy < doubt[row]:
                    doubt[row] = entropy
                    best[row] = piece.ids[row][piece.mask[row]]
            on_read(int(piece.mask.sum()))
        prompts = self._prompts(asked, best)
        yield asked, self._generate(self.base, prompts.ids, prompts.mask, asked)

    def _entropy(self, ids: Tokens, mask: NDArray[np.bool_]) -> list[float]:
        """Entropy (nats) of what comes first after each prompt (B, T)."""
        import torch

        out = self.base.generate(
            input_ids=torch.from_numpy(ids).to(self.base.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self.base.device),
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

    # What is read begins with the question.
    shares_texts: ClassVar[bool] = False

    def text(self, asked: Asked) -> tuple[Iterator[NDArray[np.int32]], int]:
        pieces = itertools.chain([asked.before, asked.after], asked.sample.ids())
        return pieces, len(asked.before) + len(asked.after) + asked.sample.tokens


class PassagesReader(MemoryReader):
    """Baseline "passages": the memory model reads what an index recalls, in order, and nothing else.

    They are a document of their own, of any number of passages, where "retrieval" shows them in the
    question's segment. So this tells what recall loses with a reader that is as good as the memory.
    """

    name: ClassVar[str] = "passages"

    # Every question recalls passages of its own.
    shares_texts: ClassVar[bool] = False

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
