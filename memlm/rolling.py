"""Memory that rolls on while text is generated: full segments are committed, the last one stays open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memlm.segment import Segment, cut
from memlm.state import MemoryState


class Reader(Protocol):
    """What rolling needs of a model."""

    @property
    def segment_length(self) -> int: ...

    def init_state(self, batch_size: int) -> MemoryState: ...

    def read(self, segments: Iterable[Segment], memory_state: MemoryState) -> MemoryState: ...


class RollingMemory:
    """The committed part of every row during one `generate`, and the state after it.

    Rows are found by their content, not by their number: beam search exchanges rows between steps, and
    a row's committed state is a function of its tokens (and of the document it began in) alone.

    prompts: (count, width) of the prompts, when they are known: the first `width` columns are then the same
    at every step, and only rows of the same prompt change places, so that only what follows has to be
    compared. None compares whole rows.
    """

    def __init__(
        self,
        model: Reader,
        state: MemoryState | None,
        prompts: tuple[int, int] | None = None,
    ) -> None:
        self.model = model
        self.initial = state
        count, self.width = (None, 0) if prompts is None else prompts
        self.documents: int | None = count if state is None else state.batch_size
        self.state: MemoryState | None = None
        # Tokens of each row within the prompts' columns, and the committed ones after them.
        self.prompts: list[Tensor] = []
        self.committed: list[Tensor] = []
        self.done: list[int] = []

    def advance(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Commit all full segments of input_ids (B, N) that are followed by a token.

        Returns the open segments (B, T') padded on the left, their mask, and the committed state.
        """
        if not self.prompts or not self.width:
            self.prompts = _rows(input_ids, attention_mask, slice(0, self.width))
        rows = _rows(input_ids, attention_mask, slice(self.width, None))
        sizes = [len(prompt) + len(row) for prompt, row in zip(self.prompts, rows, strict=True)]
        if 0 in sizes:
            raise ValueError(
                "input_ids has a prompt without a token; give at least one token per row"
            )
        length = self.model.segment_length
        state, done = self._align(rows)
        goal = [(size - 1) // length * length for size in sizes]
        if any(a < b for a, b in zip(done, goal, strict=True)):
            ids, mask = _padded(self._between(rows, done, goal), "right")
            state = self.model.read(cut(ids, mask.to(torch.bool), None, length), state)
        self.state, self.done = state, goal
        self.committed = [
            row[: max(0, end - len(prompt))]
            for prompt, row, end in zip(self.prompts, rows, goal, strict=True)
        ]
        ids, mask = _padded(self._between(rows, goal, sizes), "left")
        return ids, mask, state

    def _between(self, rows: list[Tensor], begin: list[int], end: list[int]) -> list[Tensor]:
        """Tokens `begin` to `end` of each row, counted from the first of its prompt."""
        found = []
        for prompt, row, a, b in zip(self.prompts, rows, begin, end, strict=True):
            size = len(prompt)
            found.append(torch.cat([prompt[a:b], row[max(0, a - size) : max(0, b - size)]]))
        return found

    def _initial(self, count: int) -> MemoryState:
        if self.initial is None:
            return self.model.init_state(count)
        if count % self.initial.batch_size:
            raise ValueError(
                f"memory_state has {self.initial.batch_size} rows, but {count} are generated; give a "
                "state with one row per prompt"
            )
        repeat = count // self.initial.batch_size
        return self.initial.select([row // repeat for row in range(count)])

    def _align(self, rows: list[Tensor]) -> tuple[MemoryState, list[int]]:
        """The committed state of each row, and how many tokens each state has read."""
        count = len(rows)
        if self.state is None:
            return self._initial(count), [0] * count
        group = count if self.documents is None else max(1, count // self.documents)
        source = [
            self._source(index, row, index // group * group, group)
            for index, row in enumerate(rows)
        ]
        if source == list(range(count)):
            return self.state, self.done
        picked = self.state.select([max(i, 0) for i in source])
        done = [self.done[i] if i >= 0 else 0 for i in source]
        if -1 in source:
            known = torch.tensor([i >= 0 for i in source], device=rows[0].device)
            picked = picked.where(known, self._initial(count))
        return picked, done

    def _source(self, index: int, row: Tensor, first: int, group: int) -> int:
        """The previous step's row, `index` if possible, that had committed the start of `row`; or -1."""
        for other in (index, *range(first, first + group)):
            prefix = self.committed[other]
            if len(prefix) <= len(row) and torch.equal(prefix, row[: len(prefix)]):
                return other
        return -1


def _rows(input_ids: Tensor, attention_mask: Tensor | None, columns: slice) -> list[Tensor]:
    """The real tokens of each row in some columns of a batch (B, N)."""
    ids = input_ids[:, columns]
    if attention_mask is None:
        return list(ids)
    mask = attention_mask[:, columns].to(torch.bool)
    return (
        list(ids) if bool(mask.all()) else [row[real] for row, real in zip(ids, mask, strict=True)]
    )


def _padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    # These rows are on the model's device; `memlm.padding` is for rows that are not there yet.
    real = [torch.ones_like(row) for row in rows]
    ids, mask = (pad_sequence(r, batch_first=True, padding_side=side) for r in (rows, real))
    return ids, mask
