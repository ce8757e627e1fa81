"""Keeps track of how an index differs from its directory, writes the difference, and reads an index back.

`store` knows which files there are and how they stay whole; this module decides what goes into which of
them, so that a save writes only what changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from memlm.retrieval import store
from memlm.retrieval.exact import Ints, Kept, Mask
from memlm.retrieval.table import ChunkTable, MappedChunkTable
from memlm.retrieval.vectors import Vectors
from memlm.retrieval.words import Words

# So many rows can always be missing from a file that is dear to write: entering them costs next to nothing.
FEW = 1024


@dataclass(frozen=True)
class Saved:
    """The directory an index was saved to or loaded from, and its state then."""

    path: str
    generation: str
    parts: list[store.PartFile]


class IndexSaver:
    """Keeps what changed in chunks and vectors since the last save, and saves it.

    words: the word index, None where there is none. saved: where the index was saved to or loaded from
    last, None for nowhere.
    """

    def __init__(self, chunks: ChunkTable, vectors: Vectors, words: Words | None) -> None:
        self.saved: Saved | None = None
        self._chunks = chunks
        self._vectors = vectors
        self._words = words
        # Changes that the directory saved to last does not have yet.
        self._added: list[tuple[Ints, Kept]] = []
        self._removed: list[int] = []
        self._rewrite_vectors = False  # write the faiss index again, rather than a tail to it
        self._rewrite_all = False

    def note_added(self, rows: Ints, kept: Kept) -> None:
        """Note that chunks with these (n,) rows and what is kept of their vectors were added."""
        if self.saved is None or self._rewrite_vectors:
            return
        self._added.append((rows, kept))
        if self._vectors.has_main and self._tail_is_long(self.saved):
            # Cheaper to write the faiss index again than to keep so many vectors for its tail.
            self._rewrite_vectors = True
            self._added = []

    def note_removed(self, rows: list[int]) -> None:
        """Note that the chunks of these rows were removed."""
        self._removed.extend(rows)

    def note_trained(self) -> None:
        """Note that the faiss index has changed as a whole."""
        self._rewrite_vectors = True

    def note_compacted(self) -> None:
        """Note that nothing in the directory is to stay."""
        self._rewrite_all = True

    def _tail_is_long(self, saved: Saved) -> bool:
        tail = sum(part.count for part in saved.parts if part.kind == "vectors")
        tail += sum(len(rows) for rows, _ in self._added)
        return self._are_many(tail)

    def _are_many(self, rows: int) -> bool:
        """Whether a file of the whole index that lacks so many rows is to be written again."""
        return rows > max(FEW, len(self._chunks) // 4)

    def save(self, target: Path, settings: dict[str, Any]) -> None:
        """Write the index into `target`, with `settings` in its manifest; into the last one, what changed.

        ValueError when the directory holds anything but an index, or was changed by another process since.
        """
        there = store.check_target(target)
        generation = there["generation"] if there else None
        target.mkdir(parents=True, exist_ok=True)
        path = os.path.realpath(target)
        saved = self.saved
        if saved is not None and (saved.path != path or generation is None):
            saved = None
        if saved is not None and saved.generation != generation:
            raise ValueError(
                f"{str(target)!r} was changed by another process since this index was read; "
                "load it again, or save elsewhere"
            )
        parts = self._new_parts(target, saved)
        if parts is None:
            return
        manifest = store.commit(target, settings, parts, generation)
        self.saved = Saved(path, manifest["generation"], manifest["parts"])
        self._added = []
        self._rewrite_vectors = self._rewrite_all = False
        if not any(part.kind == "removed" for part in parts):
            self._removed = []

    def _new_parts(self, target: Path, saved: Saved | None) -> list[store.PartFile] | None:
        """Write what is new and return all parts; None when nothing changed."""
        whole = (
            saved is None
            or self._rewrite_all
            or not store.intact(target, saved.parts)
            or 4 * len(self._removed) > len(self._chunks)
        )
        if whole or saved is None:
            main = self._vector_parts(target)
            return [*self._chunk_parts(target, []), *main, *self._word_parts(target, [])]
        by_kind = {
            kind: [part for part in saved.parts if part.kind == kind] for kind in store.KINDS
        }
        removed = by_kind["removed"]
        if len(self._removed) != sum(part.count for part in removed):
            rows = self._removed
            removed = [
                store.write_part(
                    target,
                    "removed",
                    (min(rows), max(rows) + 1),
                    len(rows),
                    lambda path: store.write_removed(path, rows),
                )
            ]
        chunks = self._chunk_parts(target, by_kind["chunks"])
        if self._rewrite_vectors:
            vectors = self._vector_parts(target)
        else:
            vectors = [*self._tail_parts(target, by_kind["vectors"]), *by_kind["main"]]
        before = [part for parts in by_kind.values() for part in parts]
        words = self._word_parts(target, by_kind["words"])
        now = [*chunks, *vectors, *words, *removed]
        return None if set(now) == set(before) else now

    def _chunk_parts(self, target: Path, before: list[store.PartFile]) -> list[store.PartFile]:
        stop = self._chunks.next_row
        added = sum(1 for _ in self._chunks.live(before[-1].stop if before else 0))
        if before and not added:
            return before
        kept = before[: store.num_parts_kept(before, added)]
        first = kept[-1].stop if kept else 0
        rows = list(self._chunks.live(first))
        part = store.write_part(
            target,
            "chunks",
            (first, stop),
            len(rows),
            lambda path: store.write_chunks(path, ((row, self._chunks[row]) for row in rows)),
        )
        return [*kept, part]

    def _vector_parts(self, target: Path) -> list[store.PartFile]:
        """All vectors: the faiss index once it is trained, and vectors that wait for training."""
        parts = []
        span = (0, self._chunks.next_row)
        self._vectors.flush(self._chunks.alive)
        if self._vectors.has_main:
            count = self._vectors.indexed
            parts = [store.write_part(target, "main", span, count, self._vectors.write)]
        elif len(self._vectors.exact):
            parts = [self._vector_part(target, self._vectors.exact.blocks, span)]
        return parts

    def _vector_part(
        self, target: Path, blocks: list[tuple[Ints, Kept]], span: tuple[int, int]
    ) -> store.PartFile:
        count = sum(len(rows) for rows, _ in blocks)
        return store.write_part(
            target,
            "vectors",
            span,
            count,
            lambda path: store.write_vectors(path, self._vectors.codes, blocks),
        )

    def _word_parts(self, target: Path, before: list[store.PartFile]) -> list[store.PartFile]:
        """The file of the word index, unless it would hold little more than the one that is there."""
        if self._words is None:
            return []
        changed = len(self._chunks)
        for part in before:
            still = int(self._chunks.alive[: part.stop].sum())
            changed = (len(self._chunks) - still) + (part.count - still)
        if not self._are_many(changed):
            return before
        span = (0, self._chunks.next_row)
        return [store.write_part(target, "words", span, len(self._chunks), self._words.write)]

    def _tail_parts(self, target: Path, before: list[store.PartFile]) -> list[store.PartFile]:
        """Vectors added since the faiss index was written, or while it is not written yet."""
        added = sum(len(rows) for rows, _ in self._added)
        if not added:
            return before
        kept = before[: store.num_parts_kept(before, added)]
        blocks, schema = [], store.vector_schema(self._vectors.codes)
        for part in before[len(kept) :]:
            file = store.verify(target, part)
            for batch in store.read_arrow(file, False, schema):
                blocks.append(store.vectors_of(file, batch, self._vectors.codes))
        live = []
        for rows, vectors in [*blocks, *self._added]:
            there = self._chunks.alive[rows]
            live.append((rows[there], vectors[there]))
        first = kept[-1].stop if kept else 0
        return [*kept, self._vector_part(target, live, (first, self._chunks.next_row))]

    @classmethod
    def opened(
        cls,
        path: Path,
        manifest: dict[str, Any],
        chunks: ChunkTable,
        vectors: Vectors,
        words: Words | None,
        mmap: bool,
    ) -> Self:
        """Fill `chunks`, `vectors` and `words`, all empty, from a directory, checked against its manifest.

        mmap: leave texts and vectors on disk. ValueError when a file is missing or damaged.
        """
        try:
            return cls._opened(path, manifest, chunks, vectors, words, mmap)
        except (KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
            # Files that are as they were written, but not by `save`.
            raise store.damaged(path / store.MANIFEST, error) from error

    @classmethod
    def _opened(
        cls,
        path: Path,
        manifest: dict[str, Any],
        chunks: ChunkTable,
        vectors: Vectors,
        words: Words | None,
        mmap: bool,
    ) -> Self:
        saver = cls(chunks, vectors, words)
        files = [(part, store.verify(path, part)) for part in manifest["parts"]]
        removed = np.zeros(manifest["next_row"], bool)
        for part, file in files:
            if part.kind == "removed":
                rows = store.read_removed(file)
                _check_rows(file, rows, len(removed))
                removed[rows] = True
                saver._removed = rows.tolist()
        texts: dict[int, str] = {}
        for part, file in files:
            if part.kind == "chunks":
                texts.update(_read_chunks(file, removed, chunks))
        chunks.skip_to(manifest["next_row"])
        # The faiss index first: a tail goes into it.
        for part, file in sorted(files, key=lambda item: item[0].kind != "main"):
            if part.kind == "main":
                vectors.read(file, mmap, chunks.alive)
            elif part.kind == "vectors":
                _read_vectors(file, chunks.alive, vectors, mmap)
            elif part.kind == "words" and words is not None:
                words.read(file, part, texts)
        if not len(chunks) == vectors.live == manifest["chunks"]:
            raise store.damaged(path / store.MANIFEST, "its counts do not match its parts")
        saver.saved = Saved(os.path.realpath(path), manifest["generation"], manifest["parts"])
        return saver


def _read_chunks(file: Path, removed: Mask, chunks: ChunkTable) -> dict[int, str]:
    """Put the chunks of a file into the table, and return the texts of rows that were removed."""
    mapped = isinstance(chunks, MappedChunkTable)
    texts: dict[int, str] = {}
    for batch in store.read_arrow(file, mapped, store.chunk_schema()):
        rows = batch.column("row").to_numpy()
        _check_rows(file, rows, len(removed))
        if (np.diff(rows) <= 0).any():
            raise store.damaged(file, "its rows do not ascend")
        gone = removed[rows]
        if gone.any():
            column = batch.column("text")
            texts.update(
                (int(rows[at]), column[at].as_py()) for at in np.flatnonzero(gone).tolist()
            )
        if isinstance(chunks, MappedChunkTable):
            chunks.map(batch, removed)
            continue
        columns = [batch.column(name).to_pylist() for name in ("id", "text", "metadata")]
        entries = zip(*columns, strict=True)
        chunks.put(
            rows[~gone], [entry for entry, out in zip(entries, gone, strict=True) if not out]
        )
    return texts


def _read_vectors(file: Path, alive: Mask, vectors: Vectors, mmap: bool) -> None:
    """Add the vectors of a file whose rows are alive; with `mmap` they are searched on disk."""
    for batch in store.read_arrow(file, mmap, store.vector_schema(vectors.codes)):
        rows, kept = store.vectors_of(file, batch, vectors.codes)
        _check_rows(file, rows, len(alive))
        there = alive[rows]
        if not there.all() and not mmap:
            rows, kept = rows[there], kept[there]
        if mmap:
            vectors.map_tail(rows, kept, int(there.sum()))
        else:
            vectors.add(rows, kept)


def _check_rows(file: Path, rows: Ints, count: int) -> None:
    """ValueError unless rows are among the `count` that were ever given."""
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        raise store.damaged(file, f"it has rows beyond the {count} that there are")
