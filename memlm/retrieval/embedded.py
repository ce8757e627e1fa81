"""The store of one process: a table of chunks, faiss, a word index, and a directory they are saved to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memlm.retrieval.arguments import ChunkEntry, check_id
from memlm.retrieval.chunk_store import ChunkStore, Matches, StoreSettings, Where
from memlm.retrieval.codes import Floats, Precision
from memlm.retrieval.faiss_vectors import make_vectors
from memlm.retrieval.saving import IndexSaver
from memlm.retrieval.table import ChunkTable, MappedChunkTable
from memlm.retrieval.words import Words


class EmbeddedStore(ChunkStore):
    """Chunks in memory, or mapped; a key is a row number. Not safe for threads: the index holds a lock."""

    def __init__(
        self,
        settings: StoreSettings,
        factory: str,
        precision: Precision | None,
        effort: int | None,
        threads: int,
        mapped: bool = False,
    ) -> None:
        self.factory = factory
        self.precision = precision
        self._mapped = mapped
        self._chunks = MappedChunkTable() if mapped else ChunkTable()
        self._vectors = make_vectors(factory, settings.dim, effort, threads, precision)
        self._words = Words(self._chunks, mapped) if settings.hybrid else None
        self._saver = IndexSaver(self._chunks, self._vectors, self._words)

    def read(self, path: Path, manifest: dict[str, Any]) -> None:
        """Read what `save` wrote, while empty. ValueError when a file is missing or damaged."""
        self._saver = IndexSaver.opened(
            path, manifest, self._chunks, self._vectors, self._words, self._mapped
        )

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def untouched(self) -> bool:
        return self._vectors.untouched

    def info(self) -> dict[str, Any]:
        saved = self._saver.saved
        return {
            "trained": self._vectors.trained,
            "train_at": self._vectors.train_at,
            "waiting": self._vectors.waiting,
            "threads": self._vectors.threads,
            "mmap": self._mapped,
            "parts": len(saved.parts) if saved else 0,
            "bytes": {
                "vectors": self._vectors.bytes,
                "words": self._words.bytes if self._words else 0,
                "texts": self._chunks.text_bytes,
                # Per chunk an id, a tuple, a dictionary entry and the strings' headers.
                "rows": len(self._chunks) * 400 + len(self._chunks.alive),
            },
        }

    def check_writable(self) -> None:
        if self._mapped:
            raise ValueError("the index was loaded with mmap=True, to read only; use mmap=False")

    def new_ids(self, count: int) -> list[str]:
        ids: list[str] = []
        number = self._chunks.next_row
        while len(ids) < count:
            name = check_id(f"chunk-{number}", "id")
            number += 1
            if name not in self._chunks.row_of:
                ids.append(name)
        return ids

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        row_of = self._chunks.row_of
        return {name: row_of[name] for name in ids if name in row_of}

    def entries(self, keys: Sequence[int]) -> list[ChunkEntry | None]:
        return [self._chunks[row] for row in keys]

    def put(self, entries: Sequence[ChunkEntry], vectors: Floats) -> None:
        if not entries:
            return
        replaced = list(self.find([entry[0] for entry in entries]).values())
        first = self._chunks.next_row
        rows = np.arange(first, first + len(entries), dtype=np.int64)
        was_trained = self._vectors.trained
        kept = self._vectors.encode(vectors)
        self._vectors.add(rows, kept)
        self._chunks.put(rows, entries)
        if self._vectors.trained != was_trained:
            self._saver.note_trained()
        self._saver.note_added(rows, kept)
        self.remove(replaced)

    def remove(self, keys: Sequence[int]) -> None:
        rows = list(keys)
        if not rows:
            return
        if self._words is not None:
            self._words.remove(rows)
        for row in rows:
            self._chunks.remove(row)
        self._vectors.remove(np.asarray(rows, np.int64), self._chunks.alive)
        self._saver.note_removed(rows)

    def search(
        self, vectors: Floats, queries: Sequence[str] | None, k: int, where: Where
    ) -> tuple[Matches, Matches]:
        mask = self._chunks.allowed(where)
        alive = self._chunks.alive[: self._chunks.next_row]
        dense: Matches = self._vectors.search(vectors, k, mask, alive)
        if queries is None or self._words is None:
            return dense, []
        return dense, [self._words.search(query, k, mask) for query in queries]

    def check_trainable(self, count: int) -> None:
        self._vectors.check_trainable(count)

    def train(self, vectors: Floats) -> None:
        self._vectors.train(vectors)
        self._saver.note_trained()

    def compact(self) -> None:
        self._vectors.compact(self._chunks.alive)
        self._saver.note_compacted()

    def save(self, directory: Path, settings: dict[str, Any]) -> None:
        own = {
            "factory": self.factory,
            "precision": self.precision,
            "effort": self._vectors.effort,
            "next_row": self._chunks.next_row,
        }
        self._saver.save(directory, {**settings, **own})
