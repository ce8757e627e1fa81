"""Diagonal after diagonal: all cells (layer, segment) with the same layer + segment are run as one.

Cell (l, s) needs what layer l - 1 made of segment s, and the memory that layer l had left after segment s -
1. Both come from the diagonal before, so L layers and S segments take L + S - 1 steps in place of L x S
(diagonal batching, Sivtsov et al. 2025). That holds where every memory belongs to one layer; a memory
around the whole decoder makes layer 0 of a segment wait for the last layer of the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

from memlm.segment import Segment

Out_co = TypeVar("Out_co", covariant=True)
Out = TypeVar("Out")


class Place(NamedTuple):
    """One layer at one segment."""

    layer: int
    segment: int


class Line(Protocol[Out_co]):
    """Layers that segments pass through one behind the other, `depth` of them."""

    @property
    def depth(self) -> int: ...

    def enter(self, number: int, segment: Segment) -> None:
        """Bring segment `number` up to the first layer."""

    def run(self, places: Sequence[Place]) -> None:
        """Run these cells, which do not depend on one another, the lowest layer first."""

    def leave(self, number: int) -> Out_co:
        """What has become of segment `number`, which has passed the last layer."""


def diagonals(layers: int, segments: int) -> Iterator[list[Place]]:
    """All cells, step by step, the lowest layer first within a step."""
    for step in range(layers + segments - 1):
        lowest, highest = max(0, step - segments + 1), min(step, layers - 1)
        yield [Place(layer, step - layer) for layer in range(lowest, highest + 1)]


def wavefront(line: Line[Out], segments: Sequence[Segment]) -> Iterator[Out]:
    """Pass `segments`, all of one shape, through `line`; yield what becomes of each, in their order."""
    for places in diagonals(line.depth, len(segments)):
        newest, oldest = places[0], places[-1]
        if newest.layer == 0:
            line.enter(newest.segment, segments[newest.segment])
        line.run(places)
        if oldest.layer == line.depth - 1:
            yield line.leave(oldest.segment)


def alike(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Runs of neighbouring segments of one length: a document's last one may be short."""
    for _, run in groupby(segments, key=lambda segment: segment.ids.shape):
        yield list(run)
