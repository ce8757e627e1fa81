"""Rows without end: every epoch in another order, which seed and epoch decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from memlm.data.opening import Rows
from memlm.data.rows import Row
from memlm.data.tables import StreamedRows


class ShuffledRows:
    """Row number n of the epochs one after the other, the same one whenever it is asked for.

    Rows of files are looked up; a stream is read forwards, and from the beginning for an earlier row.
    """

    def __init__(self, rows: Rows, seed: int = 0) -> None:
        self.rows, self.seed = rows, seed
        self._order: tuple[int, np.ndarray] | None = None
        self._stream: Iterator[Row] | None = None
        self._epoch, self._read = 0, 0
        self._size = rows.size if isinstance(rows, StreamedRows) else None

    def __getstate__(self) -> dict[str, Any]:
        # A spawned data worker reads a stream by itself.
        return {**self.__dict__, "_stream": None}

    def __getitem__(self, number: int) -> Row:
        if isinstance(self.rows, StreamedRows):
            return self._streamed(self.rows, number)
        epoch, index = divmod(number, len(self.rows))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
            self._order = epoch, order
        found: Row = self.rows[int(self._order[1][index])]
        return found

    def _streamed(self, rows: StreamedRows, number: int) -> Row:
        while True:
            # How long an epoch is, is known when one has been read.
            epoch, index = (0, number) if self._size is None else divmod(number, self._size)
            if self._stream is None or epoch != self._epoch or index < self._read:
                self._stream = rows.epoch(epoch, self.seed)
                self._epoch, self._read = epoch, 0
            for row in self._stream:
                self._read += 1
                if self._read > index:
                    return row
            self._size, self._stream = self._read, None
