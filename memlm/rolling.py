"""Memory that rolls on while text is generated: full segments are committed, the last one stays open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from memlm.segment import Segment, cut
from memlm.state import MemoryState


class Reader(Protocol):
    """What rolling needs of a model."""

    @property
    def segment_length(self) -> int: ...

    def init_state(self, batch_size: int) -> MemoryState: ...

    def read(self, segments: Iterable[Segment], memory_state: MemoryState) -> MemoryState: ...


class RollingMemory:
    """The committed part of every row during one `generate`, and the state behind it.

    Rows are found by their content, not by their number: beam search exchanges rows between steps, and
    a row's committed state is a function of its tokens (and of the document it began in) alone.
    """

    def __init__(self, model: Reader, state: MemoryState | None) -> None:
        self.model = model
        self.initial = state
        self.state: MemoryState | None = None
        self.committed: list[Tensor] = []

    def advance(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, MemoryState]:
        """Commit all full segments of input_ids (B, N) that a later token follows.

        Returns the open segments (B, T') padded on the left, their mask, and the committed state.
        """
        rows = [
            ids if attention_mask is None else ids[mask.to(torch.bool)]
            for ids, mask in zip(
                input_ids,
                input_ids if attention_mask is None else attention_mask,
                strict=True,
            )
        ]
        if any(len(row) == 0 for row in rows):
            raise ValueError(
                "input_ids has a prompt without a token; give at least one token a row"
            )
        length = self.model.segment_length
        start = self._initial(len(rows))
        group = max(1, len(rows) // (self.initial.batch_size if self.initial else len(rows)))
        state, done = self._align(rows, start, group)
        goal = [(len(row) - 1) // length * length for row in rows]
        pending = [row[a:b] for row, a, b in zip(rows, done, goal, strict=True)]
        if any(len(piece) for piece in pending):
            ids, mask = _padded(pending, left=False)
            state = self.model.read(cut(ids, mask.to(torch.bool), None, length), state)
        self.state = state
        self.committed = [row[:b] for row, b in zip(rows, goal, strict=True)]
        ids, mask = _padded([row[b:] for row, b in zip(rows, goal, strict=True)], left=True)
        return ids, mask, state

    def _initial(self, count: int) -> MemoryState:
        if self.initial is None:
            return self.model.init_state(count)
        if count % self.initial.batch_size:
            raise ValueError(
                f"memory_state has {self.initial.batch_size} rows, but {count} are generated; give a "
                "state with one row a prompt"
            )
        repeat = count // self.initial.batch_size
        return self.initial.select([row // repeat for row in range(count)])

    def _align(
        self, rows: list[Tensor], start: MemoryState, group: int
    ) -> tuple[MemoryState, list[int]]:
        """For each row the committed state that is its own, and how many tokens that holds."""
        if self.state is None:
            return start, [0] * len(rows)
        source, done = [], []
        for index, row in enumerate(rows):
            candidates = [index, *(i for i in range(len(rows)) if i != index)]
            found = -1
            for other in candidates:
                same_document = self.initial is None or other // group == index // group
                prefix = self.committed[other]
                if (
                    same_document
                    and len(prefix) <= len(row)
                    and torch.equal(prefix, row[: len(prefix)])
                ):
                    found = other
                    break
            source.append(found)
            done.append(len(self.committed[found]) if found >= 0 else 0)
        if source == list(range(len(rows))):
            return self.state, done
        picked = self.state.select([max(i, 0) for i in source])
        known = torch.tensor([i >= 0 for i in source], device=rows[0].device)
        return picked.where(known, start), done


def _padded(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids = rows[0].new_zeros((len(rows), width))
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[index, at] = row
        mask[index, at] = 1
    return ids, mask
