"""What answering a batch costs: seconds, seconds spent waiting for data, and memory."""

from __future__ import annotations

import time
from typing import Any

from memlm.eval.running.feed import Feed
from memlm.peak import PeakMemory

__all__ = ["Clock", "PeakMemory"]


class Clock:
    """Counts seconds, and those of them spent waiting for data."""

    def __init__(self, feed: Feed[Any]) -> None:
        self._feed = feed
        self._began, self._waited = time.perf_counter(), feed.waited

    def lap(self) -> tuple[float, float]:
        """The seconds since the lap before, or since it was made, and those spent waiting."""
        before = self._began, self._waited
        self._began, self._waited = time.perf_counter(), self._feed.waited
        return self._began - before[0], self._waited - before[1]
