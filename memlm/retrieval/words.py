"""The word index of a table of chunks: brought up to date when it is needed, and kept in a file.

A file holds the words of the rows that were there when it was written. Rows added since are entered, and
rows removed since are taken out, when it is read.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np

from memlm.retrieval import store
from memlm.retrieval.exact import Mask
from memlm.retrieval.lexical import Lexical
from memlm.retrieval.table import ChunkTable


class Words:
    """Search by word over the chunks of a table.

    mapped: the table is on disk and read-only, and so is the word index: the file itself where it is up to
    date, otherwise a temporary one.
    """

    def __init__(self, chunks: ChunkTable, mapped: bool = False) -> None:
        self._chunks = chunks
        self._mapped = mapped
        self._lexical = Lexical(on_disk=mapped)
        self._below = 0  # rows below this number were entered

    @property
    def bytes(self) -> int:
        return self._lexical.bytes

    def search(self, query: str, k: int, mask: Mask | None) -> list[tuple[int, float]]:
        """As `Lexical.search`, over all chunks that are there."""
        self.update()
        return self._lexical.search(query, k, mask)

    def update(self) -> None:
        """Enter the rows added since the last time."""
        rows = self._chunks
        if self._below < rows.next_row:
            added = list(rows.live(self._below))
            if added:
                self._lexical.add((row, rows[row][1]) for row in added)
            self._below = rows.next_row

    def remove(self, rows: list[int]) -> None:
        """Take rows out that are still in the table."""
        self._lexical.remove([(row, self._chunks[row][1]) for row in rows if row < self._below])

    def write(self, path: Path) -> None:
        self.update()
        self._lexical.write(path)

    def read(self, path: Path, part: store.PartFile, removed: dict[int, str]) -> None:
        """Use the file of a part whose checksum is right.

        removed: the texts of rows that are in the files of chunks and no longer in the table.
        """
        try:
            there = Lexical.opened(path)
            rows = np.asarray(there.rows(), np.int64)
            alive = self._chunks.alive[: self._chunks.next_row]
            inside = np.zeros(len(alive), bool)
            known = bool(np.isin(rows, np.arange(min(part.stop, len(alive)))).all())
            if len(rows) != part.count or not known:
                raise store.damaged(path, "its rows are not those of the index")
            inside[rows] = True
            if (alive[: part.stop] & ~inside[: part.stop]).any():
                raise store.damaged(path, "it lacks rows of the index")
            gone = np.flatnonzero(inside & ~alive).tolist()
            if not set(gone) <= removed.keys():
                raise store.damaged(path, "it has rows that no file of chunks has")
            self._below = part.stop
            if self._mapped and not gone and not alive[part.stop :].any():
                self._lexical.close()
                self._lexical = there
                return
            self._lexical.read(there)
            there.close()
            self._lexical.remove([(row, removed[row]) for row in gone])
        except sqlite3.DatabaseError as error:
            raise store.damaged(path, error) from error
