"""Segment after segment, each through the whole base model: works for every memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch.utils.checkpoint import checkpoint

from memlm.segment import Segment
from memlm.state import MemoryState

Out = TypeVar("Out")
Step = Callable[[Segment, MemoryState], tuple[Out, MemoryState]]


def sequential(
    step: Step[Out], segments: Iterable[Segment], state: MemoryState, *, recompute: bool = False
) -> Iterator[tuple[Out, MemoryState]]:
    """Yield `step`'s result and the state after each segment.

    recompute: keep no activations of a segment but its state, and run it again in backward.
    """
    for segment in segments:
        if recompute:
            out, state = checkpoint(step, segment, state, use_reentrant=False)
        else:
            out, state = step(segment, state)
        yield out, state
