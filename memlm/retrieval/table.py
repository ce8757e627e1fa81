"""Chunks by row number: text, id and metadata, in memory or on disk, and which rows a filter allows.

A row number is given once and never again; removing leaves a gap.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memlm.retrieval.arguments import ABSENT, Absent, ChunkEntry, Value

if TYPE_CHECKING:
    import pyarrow as pa


def _posting_key(key: str, value: Value | Absent) -> tuple[str, bool, Value | Absent]:
    # True == 1 in Python, but a flag is not a number; 1 and 1.0 are the same.
    return key, isinstance(value, bool), value


@dataclass
class ChunkTable:
    """Chunks by row. Lists have an entry for every row ever given; that of a removed row is None."""

    entries: list[ChunkEntry | None] = field(default_factory=list)
    row_of: dict[str, int] = field(default_factory=dict)
    alive: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1024, bool))
    next_row: int = 0
    text_bytes: int = 0
    _postings: dict[tuple[str, bool, Value | Absent], array[int]] = field(default_factory=dict)
    _entered_below: int = 0

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, row: int) -> ChunkEntry:
        """Id, text and metadata JSON of a row that is there."""
        entry = self.entries[row]
        assert entry is not None
        return entry

    def live(self, start: int = 0) -> Iterator[int]:
        """Rows that are there, from `start` on, ascending."""
        return map(int, np.flatnonzero(self.alive[start : self.next_row]) + start)

    def put(self, rows: NDArray[np.int64], new: Sequence[ChunkEntry]) -> None:
        """Put chunks into rows, which ascend and lie beyond all earlier ones."""
        self._grow_to(int(rows[-1]) + 1 if len(rows) else self.next_row)
        for row, entry in zip(rows.tolist(), new, strict=True):
            self.entries.extend([None] * (row - len(self.entries)))
            self.entries.append(entry)
            self.text_bytes += len(entry[1])
        self._mark_present(rows, [entry[0] for entry in new])

    def _mark_present(self, rows: NDArray[np.int64], ids: Sequence[str]) -> None:
        self.row_of.update(zip(ids, rows.tolist(), strict=True))
        self.alive[rows] = True

    def _grow_to(self, rows: int) -> None:
        if rows > len(self.alive):
            grown = np.zeros(max(rows, 2 * len(self.alive)), bool)
            grown[: len(self.alive)] = self.alive
            self.alive = grown
        self.next_row = max(self.next_row, rows)

    def skip_to(self, next_row: int) -> None:
        """Never give a row below `next_row` again."""
        self._grow_to(next_row)
        self.entries.extend([None] * (next_row - len(self.entries)))

    def remove(self, row: int) -> None:
        """Forget the chunk of a row; its id may belong to another row by now."""
        ident, text, _ = self[row]
        if self.row_of.get(ident) == row:
            del self.row_of[ident]
        self.alive[row] = False
        self.entries[row] = None
        self.text_bytes -= len(text)

    def allowed(self, where: dict[str, list[Value | Absent]]) -> NDArray[np.bool_] | None:
        """(next_row,) bool: chunks whose metadata holds one of the values for every key; None for all."""
        if not where:
            return None
        self._enter_metadata()
        mask = self.alive[: self.next_row].copy()
        for key, values in where.items():
            matching = np.zeros(self.next_row, bool)
            for value in values:
                posted = _posting_key(key, ABSENT if value is ABSENT else value)
                rows = np.frombuffer(self._postings.get(posted, array("q")), np.int64)
                if value is ABSENT:
                    lacking = np.ones(self.next_row, bool)
                    lacking[rows] = False
                    matching |= lacking
                else:
                    matching[rows] = True
            mask &= matching
        return mask

    def _enter_metadata(self) -> None:
        """Enter rows added since the last filtered search: without filters this costs nothing."""
        for row in self.live(self._entered_below):
            metadata = self[row][2]
            for key, value in json.loads(metadata).items() if metadata else ():
                self._postings.setdefault(_posting_key(key, value), array("q")).append(row)
                # ABSENT lists the rows that do have the key, whatever its value.
                self._postings.setdefault(_posting_key(key, ABSENT), array("q")).append(row)
        self._entered_below = self.next_row


class MappedChunkTable(ChunkTable):
    """Rows whose texts stay in memory-mapped Arrow files, and ids in memory. It is read-only."""

    def __init__(self) -> None:
        super().__init__()
        self._starts: list[int] = []
        self._batches: list[tuple[NDArray[np.int64], pa.RecordBatch]] = []

    def map(self, batch: pa.RecordBatch, removed: NDArray[np.bool_]) -> None:
        """Add a batch with columns row, id, text, metadata; rows where `removed` is True are not there."""
        rows = batch.column("row").to_numpy()
        if not len(rows):
            return
        self._starts.append(int(rows[0]))
        self._batches.append((rows, batch))
        self._grow_to(int(rows[-1]) + 1)
        kept = ~removed[rows]
        ids = batch.column("id").to_pylist()
        self._mark_present(rows[kept], [i for i, keep in zip(ids, kept, strict=True) if keep])

    def skip_to(self, next_row: int) -> None:
        self._grow_to(next_row)

    def __getitem__(self, row: int) -> ChunkEntry:
        rows, batch = self._batches[bisect_right(self._starts, row) - 1]
        at = int(np.searchsorted(rows, row))
        ident, text, notes = (batch.column(c)[at].as_py() for c in ("id", "text", "metadata"))
        return ident, text, notes
