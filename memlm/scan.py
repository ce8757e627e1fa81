"""The one loop over a document: windows of `bptt_depth` segments, gradients cut between them.

Training runs backward between two yields, evaluation and streaming read the outputs, generation commits
full segments: all of them through here, so that a window is the same thing everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from memlm.segment import Segment
from memlm.state import MemoryState

Out = TypeVar("Out")


def scan(
    run_window: Callable[[list[Segment], MemoryState], tuple[Out, MemoryState]],
    segments: Iterable[Segment],
    state: MemoryState,
    bptt_depth: int,
) -> Iterator[tuple[Out, MemoryState]]:
    """Run windows of `bptt_depth` segments; yield each window's output and the state behind it.

    The state handed to the next window is detached: no gradient flows from a window into an earlier
    one. `segments` is consumed lazily.
    """
    if bptt_depth < 1:
        raise ValueError(f"bptt_depth={bptt_depth} must be at least 1 segment")
    pieces = iter(segments)
    while window := list(islice(pieces, bptt_depth)):
        out, state = run_window(window, state)
        yield out, state
        state = state.detach()
