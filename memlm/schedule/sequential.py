"""Segment after segment, each through the whole base model: works for every memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from memlm.segment import Segment
from memlm.state import MemoryState

Out = TypeVar("Out")
Step = Callable[[Segment, MemoryState], tuple[Out, MemoryState]]
# Runs a function, given first, on the other arguments, and again in backward: torch's `checkpoint`, say.
Checkpoint = Callable[..., Any]


def sequential(
    step: Step[Out],
    segments: Iterable[Segment],
    state: MemoryState,
    *,
    recompute: Checkpoint | None = None,
) -> Iterator[tuple[Out, MemoryState]]:
    """Yield `step`'s result and the state after each segment.

    recompute: keeps no activations of a segment but its state, and runs it again in backward; None: all are
    kept.
    """
    for segment in segments:
        if recompute is not None:
            out, state = recompute(step, segment, state)
        else:
            out, state = step(segment, state)
        yield out, state
