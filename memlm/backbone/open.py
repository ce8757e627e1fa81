"""The open segment while it grows by single tokens: what has been computed of it, to be gone on from.

Keys and values are kept in transformers' own cache, which here also holds what memories put in front of
them. A memory that writes token by token has a provisional state beside the committed one; nothing of
it is committed: when the segment is full, it is run once more as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from memlm.memory.base import QKV, Continues, Site
from memlm.state import flatten, unflatten, where_rows

# Calls a memory: (x, state, inner, mask, write) -> its output and the state it leaves.
Use = Callable[..., tuple[Any, Any]]


class Front(NamedTuple):
    """What a memory put in front of a stage's sequence: how many positions, and which (B, size) are real.

    real: None when all are.
    """

    size: int
    real: Tensor | None

    def reorder(self, rows: Tensor) -> Front:
        return self if self.real is None else self._replace(real=_picked(self.real, rows))


class Keys(Cache):
    """Keys and values of the open segment, layer by layer, as transformers' attention modules take them.

    A layer may hold more of them than the decoder has columns: masks are made for the decoder's.
    """

    def __init__(self, config: Any) -> None:
        # A segment is short: nothing leaves a sliding window's cache, which the mask limits.
        found = DynamicCache(config=config).layers
        super().__init__(layers=[DynamicLayer() if _slides(one) else one for one in found])
        self.columns = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.columns + query_length, 0


def _slides(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False))


class OpenSegment:
    """What is kept of one open segment of every row. All added tokens are real.

    config: the decoder's. mask (B, columns) bool: the decoder's columns that are real, None when all are.
    places (B or 1, T): those of the positions that pass the decoder now.
    """

    def __init__(self, config: Any) -> None:
        self.keys = Keys(config)
        self.mask: Tensor | None = None
        self.places: Tensor | None = None
        self.front: dict[tuple[Site, int], Front] = {}
        self.cells: dict[str, Progress] = {}

    @property
    def begun(self) -> bool:
        """Whether tokens are added now to a segment that has begun."""
        return self.keys.columns > 0

    def enter(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """Let `x` (B, T, .), with its mask, pass the decoder: the mask of all columns up to its end."""
        before, count, batch = self.keys.columns, x.shape[1], x.shape[0]
        if mask is None and self.mask is None:
            self.places = torch.arange(before, before + count, device=x.device)[None]
            return None
        known = x.new_ones(batch, before, dtype=torch.bool) if self.mask is None else self.mask
        fresh = x.new_ones(batch, count, dtype=torch.bool) if mask is None else mask
        self.mask = torch.cat([known, fresh], dim=1)
        self.places = (self.mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, before:]
        return self.mask

    def leave(self, x: Tensor) -> None:
        """`x` has passed the decoder."""
        self.keys.columns += x.shape[1]

    def places_behind(self, front: Front) -> Tensor:
        """(B or 1, T) places in a layer's sequence that has `front` in front of the decoder's columns."""
        assert self.places is not None
        if front.real is None:
            return self.places + front.size
        return self.places + front.real.sum(dim=1, keepdim=True).to(self.places.device)

    def progress(self, name: str, continues: Continues, state: Any) -> Progress:
        """The progress of the memory called `name`, whose committed state is `state`."""
        if name not in self.cells:
            self.cells[name] = Progress(continues, state)
        return self.cells[name]

    def reorder(self, rows: Tensor, known: dict[int, Tensor]) -> None:
        """Row i goes on from what row rows[i] (B,) was; `known`: tensors, by id, picked already."""
        self.keys.reorder_cache(rows)
        if self.mask is not None:
            self.mask = _picked(self.mask, rows)
        self.front = {place: front.reorder(rows) for place, front in self.front.items()}
        for one in self.cells.values():
            one.reorder(rows, known)


class Progress:
    """One memory within the open segment.

    state: what stands for the tokens before `x`; x, mask, counts: tokens that no state stands for yet, the
    last of each row, and how many they are.
    """

    def __init__(self, continues: Continues, state: Any) -> None:
        # Tokens after which the memory's state stands for them; 0 for never.
        self.every = continues.length if continues.how == "write" else 0
        self.keeps = continues.how == "whole" or self.every > 1
        self.state = state
        self.x: Any = None
        self.mask: Tensor | None = None
        self.counts: list[int] = []

    def go_on(
        self, use: Use, inner: Callable[..., Any], x: Any, mask: Tensor | None, begun: bool
    ) -> Any:
        """What the memory makes of `x`, the tokens that come next."""
        count = _length(x)
        if begun:
            inner = partial(_of_the_last, inner, count)
        if not self.keeps:
            y, new = use(x, self.state, inner, mask=mask, write=self.every == 1)
            self.state = new
            return y
        if self.every:
            fresh = [count] * len(_part(x)) if mask is None else mask.sum(dim=1).tolist()
            self.counts = [
                a + b for a, b in zip(self.counts or [0] * len(fresh), fresh, strict=True)
            ]
        self._append(x, mask)
        stands = [n // self.every * self.every for n in self.counts] if self.every else []
        exact = all(n in (0, m) for n, m in zip(stands, self.counts, strict=True))
        writes = any(stands) and exact
        y, new = use(self.x, self.state, inner, mask=self.mask, write=writes)
        if any(stands):
            if not exact:
                # Rows whose last tokens the state cannot stand for yet: once more, without those.
                new = use(self.x, self.state, _unused, mask=self._first(stands), write=True)[1]
            self._let_stand(new, stands)
        return _tail(y, count)

    def _append(self, x: Any, mask: Tensor | None) -> None:
        if self.x is None:
            self.x, self.mask = x, mask
            return
        if mask is not None or self.mask is not None:
            ones = [
                _part(one).new_ones(_rows_and_length(one), dtype=torch.bool) for one in (self.x, x)
            ]
            known = ones[0] if self.mask is None else self.mask
            self.mask = torch.cat([known, ones[1] if mask is None else mask], dim=1)
        self.x = _joined(self.x, x)

    def _first(self, counts: list[int]) -> Tensor:
        """(B, T) bool: the first tokens of each row that are kept here, `counts` of them."""
        x = _part(self.x)
        mask = self.mask
        if mask is None:
            mask = x.new_ones(_rows_and_length(self.x), dtype=torch.bool)
        limit = torch.tensor(counts, device=mask.device).unsqueeze(1)
        return mask & (mask.long().cumsum(dim=1) <= limit)

    def _let_stand(self, new: Any, counts: list[int]) -> None:
        """Let the state `new` stand for the first `counts` tokens of each row that are kept here."""
        stood = self._first(counts)
        rows = stood.any(dim=1)
        self.state = mapped(partial(where_rows, rows), new, self.state)
        self.counts = [n - m for n, m in zip(self.counts, counts, strict=True)]
        rest = max(self.counts)
        if not rest:
            self.x = self.mask = None
            return
        known = torch.ones_like(stood) if self.mask is None else self.mask
        # Padding and what is stood for come first in every row.
        self.mask = (known & ~stood)[:, known.shape[1] - rest :]
        self.x = _tail(self.x, rest)

    def reorder(self, rows: Tensor, known: dict[int, Tensor]) -> None:
        def picked(value: Tensor) -> Tensor:
            if id(value) not in known:
                known[id(value)] = _picked(value, rows)
            return known[id(value)]

        self.state = mapped(picked, self.state)
        if self.mask is not None:
            self.mask = picked(self.mask)
        if self.x is not None:
            self.x = QKV(*map(picked, self.x)) if isinstance(self.x, QKV) else picked(self.x)
        if self.counts:
            self.counts = [self.counts[row] for row in rows.tolist()]


def mapped(function: Callable[..., Tensor], *trees: Any) -> Any:
    """`function` on the leaves of states of the same structure."""
    named = [dict(flatten(tree, "")) for tree in trees]
    found = {name: function(*(one[name] for one in named)) for name in named[0]}
    return unflatten(trees[0], "", found)


def _picked(value: Tensor, rows: Tensor) -> Tensor:
    return value.index_select(0, rows.to(value.device))


def _of_the_last(inner: Callable[..., Any], count: int, x: Any, *rest: Any, **given: Any) -> Any:
    """`inner` on the last `count` positions alone; it knows those before them."""
    last = _tail(x, count)
    if last is x:
        return inner(x, *rest, **given)
    if given.get("times") is not None:
        raise TypeError("a memory that inserts positions between tokens cannot go on in a segment")
    before = _length(x) - count
    if before and given.get("parts"):
        raise TypeError("a memory that joins the softmax must go on from the added tokens alone")
    y = inner(last, *rest, **{k: v for k, v in given.items() if k == "parts"})
    return F.pad(y, (0, 0, before, 0)) if before else y


def _unused(x: Any, *args: Any, **options: Any) -> Tensor:
    """An `inner` whose result goes nowhere."""
    return _part(x)


def _part(x: Any) -> Tensor:
    return x.q if isinstance(x, QKV) else x


def _length(x: Any) -> int:
    return int(_part(x).shape[-2])


def _rows_and_length(x: Any) -> tuple[int, int]:
    return len(_part(x)), _length(x)


def _tail(x: Any, count: int) -> Any:
    """The last `count` positions of (B, T, D), of (B, H, T, dh), or of a QKV, whose keys are as many."""
    if isinstance(x, QKV):
        parts = [_tail(part, count) for part in x]
        return x if all(a is b for a, b in zip(parts, x, strict=True)) else QKV(*parts)
    return x if x.shape[-2] == count else x[..., x.shape[-2] - count :, :]


def _joined(a: Any, b: Any) -> Any:
    if isinstance(a, QKV):
        return QKV(*(torch.cat(pair, dim=-2) for pair in zip(a, b, strict=True)))
    return torch.cat([a, b], dim=-2)
