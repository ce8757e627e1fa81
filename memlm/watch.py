"""Watches over the states of a call: one that is no longer finite is refused, but looked at late.

Whether a number is finite is known to the device that computed it, and asking makes the host wait for all
that was handed over before. So sizes are collected, and asked for together: every `EVERY` segments, and
before the call returns. The error still names the segment in which it began.
"""

from __future__ import annotations

from torch import Tensor

from memlm.attach import MemoryStack
from memlm.state import MemoryState

EVERY = 32


class Watch:
    """The states after the segments of one call, in order."""

    def __init__(self, memory: MemoryStack) -> None:
        self.memory = memory
        self._sizes: list[Tensor] = []
        self._last: MemoryState | None = None
        self._checked = 0

    def add(self, sizes: Tensor, state: MemoryState) -> None:
        """Note the next segment. FloatingPointError as `check` raises it.

        sizes: `MemoryState.largest` of the state after it. state: any of this model's, for the names.
        """
        self._sizes.append(sizes)
        self._last = state
        if len(self._sizes) == EVERY:
            self.check()

    def check(self) -> None:
        """FloatingPointError where a state that was noted is not finite."""
        if self._last is not None:
            self.memory.check_finite(self._sizes, self._last, first_segment=self._checked)
        self._checked += len(self._sizes)
        self._sizes, self._last = [], None
