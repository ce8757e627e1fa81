"""What answering a batch costs: seconds, seconds spent waiting for data, and memory."""

from __future__ import annotations

import time
from typing import Any

from memlm.eval.running.feed import Feed
from memlm.peak import PeakMemory

__all__ = ["Clock", "PeakMemory"]


class Clock:
    """The seconds since it was made, and those of them spent waiting for data."""

    def __init__(self, feed: Feed[Any]) -> None:
        self._feed = feed
        self._began, self._waited = time.perf_counter(), feed.waited

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._began, self._feed.waited - self._waited
