"""Memory that rolls on while text is generated: full segments are committed, the last one stays open."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, StoppingCriteria, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from memlm.backbone import OpenSegment
from memlm.segment import Segment, cut
from memlm.state import MemoryState
from memlm.writes import WriteCount


class Reader(Protocol):
    """What rolling needs of a model."""

    @property
    def segment_length(self) -> int: ...

    def init_state(self, batch_size: int) -> MemoryState: ...

    def read(
        self,
        segments: Iterable[Segment],
        memory_state: MemoryState,
        writes: WriteCount | None = None,
    ) -> MemoryState: ...


@dataclass(frozen=True)
class Place:
    """How far every row has been read.

    state: what was committed. rows: each row's tokens after that. prompts: how many of them a prompt gave.
    """

    state: MemoryState
    rows: list[Tensor]
    prompts: list[int]

    def select(self, index: list[int]) -> Place:
        """Row i is what row index[i] was."""
        if index == list(range(len(self.rows))):
            return self
        rows = [self.rows[i] for i in index]
        return Place(self.state.select(index), rows, [self.prompts[i] for i in index])

    def then(self, fresh: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        """Each row's open tokens, with `fresh` (B, n) behind them, of row i the first `counts[i]`."""
        if not fresh.shape[1]:
            return self.rows
        if counts is None:
            return [torch.cat(pair) for pair in zip(self.rows, fresh, strict=True)]
        together = zip(self.rows, fresh, counts, strict=True)
        return [torch.cat((row, new[:count])) for row, new, count in together]


class RowEnds(StoppingCriteria):
    """Which rows have stopped at which column, by whatever criterion; none of its own.

    What follows in a stopped row is padding, where generation pads at all: where it knows an end token.
    """

    def __init__(self) -> None:
        self.columns: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def watch(self, criteria: StoppingCriteriaList) -> StoppingCriteriaList:
        """`criteria` without this one, with what they find kept here where that may be more than ends."""
        others = StoppingCriteriaList(one for one in criteria if one is not self)
        pads = any(hasattr(one, "eos_token_id") for one in others)
        # These stop rows where their last token says so, or all of them at once.
        known = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
        return (
            _Watched(others, self) if pads and not all(type(o) in known for o in others) else others
        )

    def see(self, stopped: Tensor, columns: int) -> None:
        """Rows (S,) that have stopped by now, when there are so many columns."""
        if self.columns is None:
            self.columns = torch.full_like(stopped, torch.iinfo(torch.long).max, dtype=torch.long)
        self.columns = torch.where(stopped, self.columns.clamp(max=columns), self.columns)

    def counts(self, known: int, total: int) -> list[int] | None:
        """How many of the columns from `known` to `total` are each row's own; None: all of them."""
        if self.columns is None:
            return None
        return (self.columns.clamp(max=total) - known).clamp(min=0).tolist()


class _Watched(StoppingCriteriaList):
    def __init__(self, criteria: StoppingCriteriaList, ends: RowEnds) -> None:
        super().__init__(criteria)
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        stopped = super().__call__(input_ids, scores, **kwargs)
        self.ends.see(stopped, input_ids.shape[1])
        return stopped


class RollingMemory(Cache):
    """Where every row stands during one `generate`, and what is kept of its open segment.

    It goes through `generate` in the place of transformers' cache, which beam search tells which row goes
    on from which. After the prompts, all rows have their tokens in the same columns.

    begin: makes an open segment of which nothing is computed yet; None to compute it anew at every token.
    ends: tokens that end a row; what follows one in a row is padding, and is never committed. stops: where
    rows have stopped for another reason, of which the same is true. pad: the token that beams are padded
    with, whose stops are not known.
    """

    def __init__(
        self,
        model: Reader,
        initial: MemoryState | None,
        begin: Callable[[], OpenSegment] | None = None,
        ends: Sequence[int] = (),
        writes: WriteCount | None = None,
        stops: RowEnds | None = None,
        pad: int | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.model, self.initial, self.begin = model, initial, begin
        self.ends, self.writes = list(ends), writes
        self.stops, self.pad = stops or RowEnds(), pad
        # Kept of the open segment: the tokens of `place` and of columns `columns[0]` to `columns[1]`.
        self.segment: OpenSegment | None = None
        self.place: Place | None = None
        self.columns = 0, 0
        # Behind the prompts' full segments.
        self.start: tuple[Place, int] | None = None

    @property
    def is_croppable(self) -> bool:
        return False

    def advance(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None, MemoryState]:
        """Commit all full segments of input_ids (B, N) that are followed by a token.

        Returns the committed state and what has to be computed after it: the tokens of the open segment,
        padded on the left, with their mask (None without padding), or those to be added to `segment`.
        """
        known, given = self.columns
        total = input_ids.shape[1]
        if self.place is None:
            self.place = self._commit(self._prompts(input_ids, attention_mask))
            self.start, known = (self.place, total), total
            self._begin_segment()
        elif max(map(len, self.place.rows)) + total - known > self.model.segment_length:
            rows = self._since(self.place, known, input_ids)
            self.place = self._commit(Place(self.place.state, rows, self.place.prompts))
            known = total
            self._begin_segment()
        elif self.segment is not None:
            self.columns = known, total
            return input_ids[:, given:], None, self.place.state
        self.columns = known, total
        ids, mask = padded(self._since(self.place, known, input_ids), "left")
        return ids, mask, self.place.state

    def after(self, sequences: Tensor, beams: bool) -> Place:
        """The place behind sequences (S, N), the rows that were generated.

        beams: they are others than the last step's rows, though of the same prompts, as many of each.
        """
        assert self.place is not None and self.start is not None
        place, known = self.place, self.columns[0]
        if beams:
            # From the prompts on: what their beams have committed since is not told apart.
            place, known = self.start
            kept, found = len(place.rows), len(sequences)
            place = place.select([row * kept // found for row in range(found)])
            rows = [
                self._unpadded(*pair) for pair in zip(place.rows, sequences[:, known:], strict=True)
            ]
        else:
            rows = self._since(place, known, sequences)
        return self._commit(Place(place.state, rows, place.prompts))

    def _since(self, place: Place, known: int, ids: Tensor) -> list[Tensor]:
        """Each row's open tokens behind those of `place`, which has the columns before `known`."""
        return place.then(ids[:, known:], self.stops.counts(known, ids.shape[1]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i goes on from what row beam_idx[i] was."""
        assert self.place is not None
        before, self.place = self.place, self.place.select(beam_idx.tolist())
        if self.segment is not None and self.place is not before:
            old, new = (place.state.tensors.values() for place in (before, self.place))
            known = {id(a): b for a, b in zip(old, new, strict=True)}
            self.segment.reorder(beam_idx, known)

    def _begin_segment(self) -> None:
        self.segment = None if self.begin is None else self.begin()

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> Place:
        rows = _rows(input_ids, attention_mask)
        sizes = [len(row) for row in rows]
        if 0 in sizes:
            raise ValueError(
                "input_ids has a prompt without a token; give at least one token per row"
            )
        return Place(self._initial(len(rows)), rows, sizes)

    def _commit(self, place: Place) -> Place:
        """`place` with the full segments committed that are followed by a token."""
        rows = [self._to_its_end(*pair) for pair in zip(place.rows, place.prompts, strict=True)]
        length = self.model.segment_length
        full = [(len(row) - 1) // length * length for row in rows]
        state = place.state
        if any(full):
            ids, mask = padded([row[:n] for row, n in zip(rows, full, strict=True)], "right")
            mask = None if mask is None else mask.to(torch.bool)
            state = self.model.read(cut(ids, mask, None, length), state, self.writes)
        prompts = [max(0, given - n) for given, n in zip(place.prompts, full, strict=True)]
        return Place(state, [row[n:] for row, n in zip(rows, full, strict=True)], prompts)

    def _unpadded(self, row: Tensor, fresh: Tensor) -> Tensor:
        """`row` with what was generated behind it, without the padding at its end."""
        if self.pad is None or self.pad in self.ends:
            # The first of them is the text's own end.
            return torch.cat((row, fresh))
        own = (fresh != self.pad).nonzero()
        return torch.cat((row, fresh[: int(own[-1]) + 1 if len(own) else 0]))

    def _to_its_end(self, row: Tensor, prompt: int) -> Tensor:
        """`row` up to the first token behind the prompt that ends it."""
        if not self.ends or len(row) == prompt:
            return row
        ends = torch.isin(row[prompt:], torch.tensor(self.ends, device=row.device)).nonzero()
        return row[: prompt + int(ends[0]) + 1] if len(ends) else row

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


def _rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """The real tokens of each row of a batch (B, N)."""
    if attention_mask is None:
        return list(input_ids)
    return [row[real] for row, real in zip(input_ids, attention_mask.to(torch.bool), strict=True)]


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor | None]:
    """Rows of tokens as one rectangle, padded on a side, and their mask, None without padding."""
    # These rows are on the model's device; `memlm.padding` is for rows that are not there yet.
    if len({len(row) for row in rows}) == 1:
        return torch.stack(rows), None
    real = [torch.ones_like(row) for row in rows]
    ids, mask = (pad_sequence(r, batch_first=True, padding_side=side) for r in (rows, real))
    return ids, mask
