"""The most memory that is in use while something runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch

MEMORY_POLL_SECONDS = 0.05


class PeakMemory:
    """The most memory in use inside the context: of the GPU where the model is on one, else resident."""

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._lap = self._before = 0
        self._stop = threading.Event()
        self._poll = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        import torch

        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._poll.start()
        return self

    def __exit__(self, *exception: object) -> None:
        import torch

        if self._device.type == "cuda":
            self.bytes = max(self._before, torch.cuda.max_memory_allocated(self._device))
        else:
            self._stop.set()
            self._poll.join()

    def lap(self) -> int:
        """The most memory in use since the lap before, or since the context was entered."""
        import torch

        if self._device.type == "cuda":
            found = torch.cuda.max_memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = max(self._before, found)
            return found
        import psutil

        # The poll may not have come round since.
        found = max(self._lap, psutil.Process().memory_info().rss)
        self._lap = 0
        return found

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        ended = False
        while True:
            used = process.memory_info().rss
            self.bytes, self._lap = max(self.bytes, used), max(self._lap, used)
            if ended:
                return
            ended = self._stop.wait(MEMORY_POLL_SECONDS)
