"""The one loop over a document: windows of `bptt_depth` segments, gradients cut between them.

Training runs backward between two yields, evaluation and streaming read the outputs, generation commits
full segments: all of them through here, so that a window is the same thing everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Literal, TypeVar

from memlm.state import MemoryState

Out = TypeVar("Out")
# A segment, or what stands for several that are read together.
Piece = TypeVar("Piece")
# Where windows are counted from: back from the last segment, or forward from the first.
Anchor = Literal["end", "start"]


def first_window(count: int, bptt_depth: int, anchor: Anchor = "end") -> int:
    """How many of `count` segments the first window holds; the others hold `bptt_depth` each.

    Counted from the end, the last window is whole: what is asked there can teach the writing of the
    `bptt_depth - 1` segments before it. Counted from the start, the last window is what remains, perhaps a
    single segment, whose gradient then reaches no other. ValueError on a depth below 1 or unknown anchor.
    """
    if bptt_depth < 1:
        raise ValueError(f"bptt_depth={bptt_depth} must be at least 1 segment")
    if anchor not in ("end", "start"):
        raise ValueError(f"bptt_anchor={anchor!r} is unknown; use 'end' or 'start'")
    return bptt_depth if anchor == "start" else (count - 1) % bptt_depth + 1


def scan(
    run_window: Callable[[list[Piece], MemoryState], tuple[Out, MemoryState]],
    segments: Iterable[Piece],
    state: MemoryState,
    bptt_depth: int,
    first: int | None = None,
) -> Iterator[tuple[Out, MemoryState]]:
    """Run windows of `bptt_depth` segments; yield each window's output and the state after it.

    The state handed to the next window is detached: no gradient flows from a window into an earlier
    one. `segments` is consumed lazily. first: segments of the first window (`first_window`, which
    must know how many there are); None, for streams of unknown length: as many as the others.
    """
    if bptt_depth < 1:
        raise ValueError(f"bptt_depth={bptt_depth} must be at least 1 segment")
    pieces = iter(segments)
    size = bptt_depth if first is None else first
    while window := list(islice(pieces, size)):
        size = bptt_depth
        out, state = run_window(window, state)
        yield out, state
        # Nothing of this window is held while the next one runs.
        del out, window
        state = state.detach()
