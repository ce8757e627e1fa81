"""Items that a thread prepares before they are needed, so that their user seldom waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """Iterate over `items`, which a thread takes from their iterator in advance, as far as `ahead` allows.

    size(item) says how much of `ahead` an item takes; at least one item is always made. `waited` sums the
    seconds spent waiting for the next item. What the iterator raises is raised where the next item would
    have been taken. A context manager: leaving it stops the thread.
    """

    def __init__(self, items: Iterator[T], ahead: int, size: Callable[[T], int]) -> None:
        self.waited = 0.0
        self._items = items
        self._ahead = ahead
        self._size = size
        self._made: deque[tuple[T, int]] = deque()
        self._held = 0
        self._changed = threading.Condition()
        self._ended = False
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._make, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            if not self._made and not self._ended:
                began = time.perf_counter()
                self._changed.wait_for(lambda: self._made or self._ended)
                self.waited += time.perf_counter() - began
            if self._made:
                item, size = self._made.popleft()
                self._held -= size
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise StopIteration

    def _make(self) -> None:
        try:
            for item in self._items:
                size = self._size(item)
                with self._changed:
                    while self._made and self._held + size > self._ahead and not self._stopped:
                        self._changed.wait()
                    if self._stopped:
                        return
                    self._made.append((item, size))
                    self._held += size
                    self._changed.notify_all()
        except BaseException as error:  # Raised again where the item would have been taken.
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
