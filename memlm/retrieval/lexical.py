"""Search by word: BM25 over SQLite's full-text module FTS5.

FTS5 was measured against `bm25s` on 20,000 chunks of 80 words (one core, CPU time). Building takes 0.3 s
against 1.0 s, adding 100 chunks 1.5 ms against 1.0 s (`bm25s` starts again), a query of ten words 9 ms
against 0.2 ms; `bm25s` cannot remove. An index here has to allow additions and removals, and the standard
library needs no new dependency, so FTS5 it is. A store without changes and with many queries would be
faster with `bm25s`.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_WORDS = 32
_WORD = re.compile(r"[^\W_]+")
# Scripts written without spaces, of which every character is a word.
_SINGLE = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff])")


def words(text: str) -> list[str]:
    """Runs of letters and digits, case-folded, without accents; Chinese and Japanese by character."""
    plain = text
    if not text.isascii():
        parts = unicodedata.normalize("NFKD", text.casefold())
        plain = "".join(c for c in parts if not unicodedata.combining(c))
        plain = _SINGLE.sub(r" \1 ", plain)
    return _WORD.findall(plain.casefold())


class Lexical:
    """BM25 over rows of text. Not safe for threads: the caller holds a lock.

    on_disk: keep the word index in a temporary file that SQLite deletes, not in memory. ValueError
    when Python's SQLite lacks FTS5.
    """

    def __init__(self, on_disk: bool = False) -> None:
        self._use(sqlite3.connect("" if on_disk else ":memory:", check_same_thread=False))
        try:
            # content='': the texts are stored elsewhere; this table holds words and rows. With a detail=
            # smaller than full, FTS5 scores every match 0.
            self._db.execute(
                "CREATE VIRTUAL TABLE chunks USING fts5(body, content='', "
                'tokenize="unicode61 remove_diacritics 0")'
            )
            self._db.execute("CREATE VIRTUAL TABLE vocabulary USING fts5vocab(chunks, row)")
        except sqlite3.OperationalError as error:
            self._db.close()
            raise ValueError(
                f"hybrid=True needs SQLite with FTS5, which this Python lacks ({error}); "
                "use a Python built with it, or hybrid=False"
            ) from error
        self.count = 0

    def _use(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._allowed: list[bytes] = []
        allowed = self._allowed
        # Not a method, which the connection would keep alive, and this object with it.
        db.create_function("allowed", 1, lambda row: allowed[-1][row])

    @classmethod
    def opened(cls, path: Path) -> Self:
        """What `write` wrote, left on disk, to read only. sqlite3.DatabaseError when it is not that."""
        # "immutable" leaves out locks and journals: nobody changes a part once it is written.
        where = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        made = cls.__new__(cls)
        made._use(sqlite3.connect(where, uri=True, check_same_thread=False))
        made.count = len(made.rows())
        return made

    def read(self, other: Lexical) -> None:
        """Become a copy of another word index, in this one's place."""
        other._db.backup(self._db)
        self.count = other.count

    def write(self, path: Path) -> None:
        """Write the word index into a file, without what was removed from it."""
        # Words that were removed stay in older segments until these are merged, and in free pages until
        # the file is written anew.
        with self._db:
            self._db.execute("INSERT INTO chunks(chunks) VALUES ('optimize')")
        # It wants a file that is not there, or is empty.
        self._db.execute("VACUUM INTO ?", (str(path),))

    def rows(self) -> list[int]:
        """The rows it holds, ascending."""
        return [row for (row,) in self._db.execute("SELECT id FROM chunks_docsize ORDER BY id")]

    def close(self) -> None:
        self._db.close()

    def __del__(self) -> None:
        # Left open, the connection would warn in Python 3.13 and later.
        if hasattr(self, "_db"):
            self._db.close()

    @property
    def bytes(self) -> int:
        """Size of the word index."""
        pages = self._db.execute("PRAGMA page_count").fetchone()[0]
        return int(pages * self._db.execute("PRAGMA page_size").fetchone()[0])

    def add(self, items: Iterable[tuple[int, str]]) -> None:
        """Add (row, text) pairs, all or none; rows must be new."""
        added = 0

        def counted() -> Iterator[tuple[int, str]]:
            nonlocal added
            for row, text in items:
                yield row, " ".join(words(text))
                added += 1

        with self._db:
            self._db.executemany("INSERT INTO chunks(rowid, body) VALUES (?, ?)", counted())
        self.count += added

    def remove(self, items: Sequence[tuple[int, str]]) -> None:
        """Remove rows, each with the text it was added with, all or none."""
        with self._db:
            self._db.executemany(
                "INSERT INTO chunks(chunks, rowid, body) VALUES ('delete', ?, ?)",
                [(row, " ".join(words(text))) for row, text in items],
            )
        self.count -= len(items)

    def search(
        self, query: str, k: int, mask: NDArray[np.bool_] | None = None
    ) -> list[tuple[int, float]]:
        """Up to k (row, BM25) pairs, best first, of rows sharing a word with `query`.

        mask: (rows,) bool, the rows allowed. The query's MAX_WORDS rarest words count; words of more
        than half the rows weigh next to nothing in BM25, and count only when there is no other.
        """
        counts = {word: self._frequency(word) for word in dict.fromkeys(words(query))}
        known = sorted((n, word) for word, n in counts.items() if n)
        rare = [word for n, word in known if 2 * n <= self.count][:MAX_WORDS]
        chosen = rare or [word for _, word in known[:MAX_WORDS]]
        if not chosen:
            return []
        # Words hold only letters and digits; in quotes none of them can be an operator of FTS5's language.
        match = " OR ".join(f'"{word}"' for word in chosen)
        if mask is not None:
            self._allowed.append(mask.tobytes())
        try:
            found = self._db.execute(
                "SELECT rowid, bm25(chunks) AS badness FROM chunks WHERE chunks MATCH ? "
                + ("" if mask is None else "AND allowed(rowid) ")
                + "ORDER BY badness, rowid LIMIT ?",
                (match, k),
            ).fetchall()
        finally:
            self._allowed.clear()
        return [(row, -badness) for row, badness in found]

    def _frequency(self, word: str) -> int:
        """Rows that hold `word`."""
        found = self._db.execute("SELECT doc FROM vocabulary WHERE term = ?", (word,)).fetchone()
        return int(found[0]) if found else 0
