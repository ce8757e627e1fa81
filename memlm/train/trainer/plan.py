"""A batch as a plan: its segments, the questions after them, and the windows it is run in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memlm.scan import Anchor, first_window
from memlm.segment import (
    BORDERS,
    IGNORE,
    Packing,
    Segment,
    cut,
    documents_in,
    joined_mask,
    shift_labels,
)


@dataclass(frozen=True)
class Questions:
    """Questions after one segment: ids, mask, labels (Q, T), rows (Q,) of the batch."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True)
class AskedSegment(Segment):
    """A segment of a training batch, with the questions asked of the memory after it."""

    questions: Questions | None = None

    @property
    def has_targets(self) -> bool:
        """Whether anything here has a target."""
        return self.questions is not None or self.has_labels

    @property
    def has_labels(self) -> bool:
        """Whether a token of the segment itself has a target."""
        return bool(self.num_targets)


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is run: its segments in windows of `depth` segments, the first window of `first`.

    learned: numbers of the windows with a target. scale: factor on the loss; 0 where the only target was
    put in so that this process takes part in the other processes' reduction.
    """

    segments: list[AskedSegment]
    depth: int
    first: int
    learned: frozenset[int]
    scale: float

    @property
    def call_pattern(self) -> list[tuple[int, bool, bool, bool]]:
        """What decides the model's calls, per segment: its window's number, whether that window is learned
        from, whether the segment itself has targets, and whether questions follow it.
        """
        found = []
        for index, segment in enumerate(self.segments):
            window = window_number(index, self.depth, self.first)
            asked = segment.questions is not None
            found.append((window, window in self.learned, segment.has_labels, asked))
        return found

    @property
    def last_learned(self) -> int:
        """The last window that is learned from; -1 for none."""
        return max(self.learned, default=-1)

    @property
    def learned_rows(self) -> Tensor | int:
        """Real rows, summed over all segments that are learned from."""
        windows = (window_number(i, self.depth, self.first) for i in range(len(self.segments)))
        return sum(
            segment.rows
            for segment, window in zip(self.segments, windows, strict=True)
            if window in self.learned
        )


def plan_batch(
    batch: dict[str, Any], length: int, depth: int | None, anchor: Anchor, *, train: bool
) -> BatchPlan:
    """Cut a batch into segments of `length` tokens and windows of `depth` segments; None: one window.

    What follows the last target is not learned from, and is read only when a later batch continues it.
    With the anchor "end", windows are counted back from that target. train: a batch without a target
    gets one that counts nothing, since all processes reduce gradients once per batch.
    """
    segments, scale = cut_batch(batch, length), 1.0
    if train and not any(segment.has_targets for segment in segments):
        segments[-1], scale = with_target(segments[-1]), 0.0
    aimed = [index for index, segment in enumerate(segments) if segment.has_targets]
    end = max(aimed, default=-1) + 1
    if batch.get("continued") is None:
        segments = segments[:end]
    depth = depth or max(len(segments), 1)
    first = first_window(max(end, 1), depth, anchor)
    learned = frozenset(window_number(index, depth, first) for index in aimed)
    return BatchPlan(segments, depth, first, learned, scale)


def window_number(segment: int, depth: int, first: int) -> int:
    """The number of the window that segment number `segment` is in: the first window holds `first`
    segments, the others `depth`.
    """
    return (segment + depth - first) // depth


def cut_batch(batch: dict[str, Any], length: int) -> list[AskedSegment]:
    """A batch as segments of `length` tokens, each with the questions after it.

    ValueError when a question follows a segment that the batch does not have.
    """
    ids, mask, targets = pack_batch(batch)
    asked: dict[int, Questions] = {}
    if "question_at" in batch:
        rows, places = batch["question_at"].unbind(dim=1)
        for place in places.unique().tolist():
            here = places == place
            width = int(batch["question_mask"][here].sum(dim=1).max())
            asked[place] = Questions(
                batch["question_ids"][here][:, :width],
                batch["question_mask"][here][:, :width],
                batch["question_labels"][here][:, :width],
                rows[here],
            )
    count = -(-ids.shape[1] // length)
    if asked and max(asked) >= count:
        raise ValueError(
            f"a question follows segment {max(asked)}, but the batch has {count} segments; "
            f"give 0 to {count - 1}"
        )
    priced = batch.get("auxiliary_mask")
    if priced is not None and priced.shape != (ids.shape[0], count):
        raise ValueError(
            f"auxiliary_mask has shape {tuple(priced.shape)}, but the batch has {ids.shape[0]} rows of "
            f"{count} segments; give a flag for each"
        )
    return [
        AskedSegment(
            segment.ids,
            segment.mask,
            segment.labels,
            segment.num_targets,
            None if priced is None else priced[:, index],
            asked.get(index),
        )
        for index, segment in enumerate(cut(ids, mask, targets, length))
    ]


def pack_batch(batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """ids, mask and shifted targets (B, n), real tokens first; the mask None when all are real.

    Documents packed into one row (`documents_in`) get a row each. ValueError without labels,
    and for questions about packed rows.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels, targets = batch.get("labels"), batch.get("shift_labels")
    if labels is None and targets is None:
        raise ValueError("the batch has no labels; give labels, with -100 where there is no target")
    given = targets if targets is not None else labels
    assert given is not None
    real = None if mask is None or bool(mask.all()) else mask.to(torch.bool)
    documents = documents_in(ids, real, **{name: batch.get(name) for name in BORDERS})
    if documents is not None and "question_at" in batch:
        raise ValueError(
            "question_at counts rows of one document, but position_ids, seq_idx or cu_seq_lens_q put "
            "several into a row; give each its own row"
        )
    if real is not None or documents is not None:
        packing = Packing.of(torch.ones_like(ids) if real is None else real, documents)
        ids, given = packing.pack(ids, 0), packing.pack(given, IGNORE)
        real = packing.mask
    return ids, real, given if targets is not None else shift_labels(given)


def count_targets(batch: dict[str, Any]) -> int:
    """Targets of a batch, those of questions included."""
    _, _, targets = pack_batch(batch)
    count = int((targets != IGNORE).sum())
    if "question_labels" in batch:
        count += int((batch["question_labels"][:, 1:] != IGNORE).sum())
    return count


def split_calls(window: Sequence[AskedSegment], whole: bool) -> Iterator[list[AskedSegment]]:
    """A window's segments, grouped into those that the model reads in one call.

    A call ends where a question is asked, and, without `whole` (for segments shorter than the model's
    own), after each segment.
    """
    call: list[AskedSegment] = []
    for segment in window:
        call.append(segment)
        if segment.questions is not None or not whole:
            yield call
            call = []
    if call:
        yield call


def join_segments(segments: Sequence[AskedSegment]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """ids, mask (None when all are real) and targets (None when there are none) side by side, (B, n)."""
    ids = torch.cat([segment.ids for segment in segments], dim=1)
    mask = joined_mask(segments)
    if not any(segment.has_labels for segment in segments):
        return ids, mask, None
    return ids, mask, torch.cat([s.labels for s in segments if s.labels is not None], dim=1)


def with_target(segment: AskedSegment) -> AskedSegment:
    """`segment` with its own first token as a target, in a row that has one."""
    labels = torch.full_like(segment.ids, IGNORE)
    row = 0 if segment.mask is None else int(segment.mask[:, 0].long().argmax())
    labels[row, 0] = segment.ids[row, 0]
    return replace(segment, labels=labels, num_targets=1)


def count_tokens(segment: Segment) -> int:
    """Real tokens of a segment."""
    return segment.ids.numel() if segment.mask is None else int(segment.mask.sum())
