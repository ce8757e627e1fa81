"""An index of chunks: found by meaning (faiss) and by word (BM25), filtered by metadata.

One lock per `ChunkIndex`, held while its embedder works, too, as few embedders allow for several threads:
threads may add and search at will, and wait for each other. After `fork()` faiss
can hang when the parent has searched with more than one thread: in forked workers use threads=1 on both
sides, or open the index in the worker. On macOS two OpenMP libraries in a process (torch's and faiss's)
can end it; use threads=1 there.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memlm.retrieval import store
from memlm.retrieval.base import Embedder
from memlm.retrieval.lexical import Lexical
from memlm.retrieval.rows import (
    MappedRows,
    Row,
    Rows,
    Value,
    check_id,
    check_ids,
    check_metadata,
    check_texts,
    check_where,
    id_of,
)
from memlm.retrieval.vectors import Floats, Ints, Mask, Vectors

METRICS = ("cosine", "inner_product")
RRF = 60  # reciprocal-rank fusion: 1 / (RRF + rank), ranks from 1


@dataclass(frozen=True, slots=True)
class Hit:
    """A chunk found. score: what the hits are sorted by, higher is nearer.

    dense: similarity of the vectors, lexical: BM25; None where that half did not find the chunk.
    """

    text: str
    id: str | int
    score: float
    metadata: dict[str, Any]
    dense: float | None = None
    lexical: float | None = None


class ChunkIndex:
    """Texts with ids and metadata, searched by meaning and by word.

    embedder: texts to (n, dim) vectors. factory: "Flat" (exact; right up to some 200,000 chunks), "SQ8",
    "SQfp16", "PQ48", "HNSW32", or "IVF1024,Flat" with Flat, SQ or PQ. metric: "cosine" (vectors are
    normalised; a zero vector scores 0) or "inner_product". hybrid: fuse the vector search with BM25 by
    reciprocal rank, so that rare exact words are found whatever the embedder. threads: of faiss.
    effort: lists probed by IVF, efSearch of HNSW; None chooses.

    A factory that learns from data (SQ8, PQ, IVF) is trained as soon as enough was added (`info()`
    ["train_at"]); until then search is exact over what was added.
    """

    def __init__(
        self,
        embedder: Embedder,
        factory: str = "Flat",
        metric: str = "cosine",
        hybrid: bool = True,
        threads: int = 1,
        effort: int | None = None,
    ) -> None:
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r} is unknown; use one of {', '.join(METRICS)}")
        _check_count("threads", threads)
        if effort is not None:
            _check_count("effort", effort)
        dim = embedder.dim
        _check_count("embedder.dim", dim)
        self.embedder = embedder
        self.factory = factory
        self.metric = metric
        self.hybrid = bool(hybrid)
        self._fingerprint = embedder.fingerprint
        self._lock = threading.RLock()
        self._rows = Rows()
        self._vectors = Vectors(factory, int(dim), effort, threads)
        self._lexical = Lexical() if hybrid else None
        self._worded = 0  # rows below are in the word index
        self._mapped = False
        # What the directory saved to last does not know yet.
        self._saved: _Saved | None = None
        self._unsaved: list[tuple[Ints, Floats]] = []
        self._removed: list[int] = []
        self._rewrite = False  # the faiss index, not a tail to it
        self._whole = False  # everything

    # --- what is in it

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: object) -> bool:
        try:
            name = check_id(id, "id")
        except ValueError:
            return False
        with self._lock:
            return name in self._rows.row_of

    def __repr__(self) -> str:
        return f"ChunkIndex(factory={self.factory!r}, metric={self.metric!r}, chunks={len(self)})"

    def get(self, id: str | int) -> Hit:
        """The chunk of an id, with score 0. KeyError when there is none."""
        with self._lock:
            row = self._rows.row_of.get(check_id(id, "id"))
            if row is None:
                raise KeyError(f"id={id!r} is not in the index")
            return self._hit(row, 0.0)

    @property
    def bytes(self) -> int:
        """Bytes of vectors, word index, texts and rows in memory; Python's own objects are estimated."""
        return sum(self.info()["bytes"].values())

    def info(self) -> dict[str, Any]:
        """Settings, counts and bytes, as plain values."""
        with self._lock:
            sizes = {
                "vectors": self._vectors.bytes,
                "words": self._lexical.bytes if self._lexical else 0,
                "texts": self._rows.text_bytes,
                # Per chunk an id, a tuple, a dictionary entry and the strings' headers.
                "rows": len(self._rows) * 400 + len(self._rows.alive),
            }
            return {
                "factory": self.factory,
                "metric": self.metric,
                "hybrid": self.hybrid,
                "dim": self._vectors.dim,
                "fingerprint": self._fingerprint,
                "chunks": len(self._rows),
                "trained": self._vectors.trained,
                "train_at": self._vectors.train_at,
                "waiting": len(self._vectors.exact),
                "threads": self._vectors.threads,
                "mmap": self._mapped,
                "parts": len(self._saved.parts) if self._saved else 0,
                "bytes": sizes,
            }

    # --- changing it

    def add(
        self,
        texts: Sequence[str],
        ids: Sequence[str | int] | None = None,
        metadata: Sequence[Mapping[str, Value]] | None = None,
    ) -> list[str | int]:
        """Add texts; returns their ids. All are added, or none.

        ids: unique text or ints (7 and "7" are two ids), made when None. metadata: one flat mapping a
        text with values of str, int, float, bool or None. The vectors of one call are in memory at once
        (4 * dim bytes a text): add a large corpus in calls of some ten thousand.
        """
        self._writable()
        texts = check_texts(texts, "texts")
        given = None if ids is None else self._given(ids, texts)
        notes = check_metadata(metadata, len(texts))
        with self._lock:
            self._refuse_known(given or [])
            vectors = self._embed(texts, self.embedder.encode)
            names = given if given is not None else self._make_ids(len(texts))
            self._insert(list(zip(names, texts, notes, strict=True)), vectors)
        return [id_of(name) for name in names]

    def update(
        self,
        ids: Sequence[str | int],
        texts: Sequence[str],
        metadata: Sequence[Mapping[str, Value]] | None = None,
    ) -> None:
        """Give chunks that are there another text; their metadata stays when None."""
        self._writable()
        texts = check_texts(texts, "texts")
        names = self._given(ids, texts)
        notes = check_metadata(metadata, len(texts))
        with self._lock:
            old = self._find(names)
            vectors = self._embed(texts, self.embedder.encode)
            if metadata is None:
                notes = [self._rows[row][2] for row in old]
            self._insert(list(zip(names, texts, notes, strict=True)), vectors)
            self._drop(old)

    def remove(self, ids: Sequence[str | int]) -> None:
        """Remove chunks. ValueError, and nothing removed, when an id is not in the index."""
        self._writable()
        names = check_ids(ids)
        with self._lock:
            self._drop(self._find(names))

    def train(self, texts: Sequence[str]) -> None:
        """Train the factory on texts like those to come; they are not added."""
        self._writable()
        texts = check_texts(texts, "texts")
        with self._lock:
            self._vectors.check_trainable(len(texts))
            vectors = self._embed(texts, self.embedder.encode)
            self._vectors.train(vectors)
            self._rewrite = True

    def compact(self) -> None:
        """Free what removed chunks still hold; the next save writes the directory as few whole parts."""
        self._writable()
        with self._lock:
            self._vectors.compact(self._rows.alive)
            self._whole = True

    # --- searching it

    def search(
        self,
        queries: Sequence[str],
        k: int = 5,
        where: Mapping[str, Any] | None = None,
        hybrid: bool | None = None,
    ) -> list[list[Hit]]:
        """The k best chunks of every query, best first: all there are when fewer, [] when none.

        where: only chunks whose metadata has, for every key, the value or one of the list of values
        (1 is 1.0 but not True; a chunk without the key is left out). hybrid: None as the index was made;
        score is then the fused 1 / (60 + rank) of both halves, otherwise the similarity of the vectors.
        """
        queries = check_texts(queries, "queries")
        _check_count("k", k)
        wanted = check_where(where)
        lexical = self._lexical if hybrid or (hybrid is None and self.hybrid) else None
        if hybrid and lexical is None:
            raise ValueError("hybrid=True, but the index was made with hybrid=False; make it anew")
        if not queries or not len(self):
            return [[] for _ in queries]
        with self._lock:
            vectors = self._embed(queries, self.embedder.encode_queries)
            mask = self._rows.allowed(wanted)
            alive = self._rows.alive[: self._rows.next_row]
            depth = k if lexical is None else max(2 * k, 50)
            dense = self._vectors.search(vectors, depth, mask, alive)
            if lexical is None:
                return [[self._hit(row, s, s) for row, s in found] for found in dense]
            self._index_words(lexical)
            return [
                self._fuse(found, lexical.search(query, depth, mask), k)
                for query, found in zip(queries, dense, strict=True)
            ]

    def likeness(self, query: str, texts: Sequence[str]) -> Floats:
        """(n,) how like texts, which need not be in the index, are to a query: the embedder's product."""
        with self._lock:
            return self.embedder.encode(texts) @ self.embedder.encode_queries([query])[0]

    def _fuse(
        self, dense: list[tuple[int, float]], lexical: list[tuple[int, float]], k: int
    ) -> list[Hit]:
        """The k best of both lists, each (row, score) and best first, by reciprocal rank."""
        fused: dict[int, float] = {}
        for found in (dense, lexical):
            for rank, (row, _) in enumerate(found, start=1):
                fused[row] = fused.get(row, 0.0) + 1 / (RRF + rank)
        similarity, bm25 = dict(dense), dict(lexical)

        def order(item: tuple[int, float]) -> tuple[float, bool, int]:
            # The first of each half tie: one sharing a word with the query is the safer answer.
            return -item[1], item[0] not in bm25, item[0]

        best = sorted(fused.items(), key=order)[:k]
        return [self._hit(row, s, similarity.get(row), bm25.get(row)) for row, s in best]

    def _hit(
        self, row: int, score: float, dense: float | None = None, lexical: float | None = None
    ) -> Hit:
        ident, text, notes = self._rows[row]
        return Hit(text, id_of(ident), score, json.loads(notes) if notes else {}, dense, lexical)

    def _index_words(self, lexical: Lexical) -> None:
        """Enter the rows added since the last search by word."""
        rows = self._rows
        if self._worded < rows.next_row:
            lexical.add((row, rows[row][1]) for row in rows.live(self._worded))
            self._worded = rows.next_row

    # --- checks and steps of a change

    def _writable(self) -> None:
        if self._mapped:
            raise ValueError("the index was loaded with mmap=True, to read only; use mmap=False")

    def _given(self, ids: Sequence[str | int], texts: list[str]) -> list[str]:
        names = check_ids(ids)
        if len(names) != len(texts):
            raise ValueError(
                f"ids has {len(names)} entries for {len(texts)} texts; give one a text"
            )
        return names

    def _refuse_known(self, names: list[str]) -> None:
        for name in names:
            if name in self._rows.row_of:
                raise ValueError(
                    f"ids has {id_of(name)!r}, which is in the index; use update, or another"
                )

    def _find(self, names: list[str]) -> list[int]:
        missing = [name for name in names if name not in self._rows.row_of]
        if missing:
            raise ValueError(
                f"ids has {id_of(missing[0])!r}, which is not in the index; add it first"
            )
        return [self._rows.row_of[name] for name in names]

    def _make_ids(self, count: int) -> list[str]:
        names: list[str] = []
        number = self._rows.next_row
        while len(names) < count:
            name = check_id(f"chunk-{number}", "id")
            number += 1
            if name not in self._rows.row_of:
                names.append(name)
        return names

    def _accept(self, fingerprint: str) -> None:
        """Refuse vectors of another embedder than those in the index."""
        if fingerprint == self._fingerprint:
            return
        if self._vectors.untouched:
            self._fingerprint = fingerprint
            return
        raise ValueError(
            f"embedder.fingerprint={fingerprint!r} differs from the index's {self._fingerprint!r}: "
            "the embedder changed; build the index again with it"
        )

    def _embed(self, texts: list[str], encode: Any) -> Floats:
        """(n, dim) C-contiguous float32, normalised for cosine. ValueError when unusable."""
        self._accept(self.embedder.fingerprint)
        if not texts:
            return np.zeros((0, self._vectors.dim), np.float32)
        vectors = np.asarray(encode(texts))
        if vectors.shape != (len(texts), self._vectors.dim) or vectors.dtype.kind != "f":
            raise ValueError(
                f"embedder returned {vectors.dtype} of shape {vectors.shape} for {len(texts)} texts; "
                f"return float32 of shape ({len(texts)}, {self._vectors.dim})"
            )
        vectors = np.array(vectors, np.float32, order="C")
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        # Beyond this a product of two vectors can leave float32; NaN fails the comparison too.
        usable = norms < 1e19
        if not usable.all():
            first = int(np.flatnonzero(~usable)[0])
            raise ValueError(
                f"embedder returned NaN, infinite or huge values for text {first}; "
                "mend the embedder, or leave the text out"
            )
        if self.metric == "cosine":
            vectors /= np.where(norms > 0, norms, 1)[:, None]
        return vectors

    def _insert(self, entries: list[Row], vectors: Floats) -> None:
        """Add checked chunks whose ids are free, or are about to be."""
        if not entries:
            return
        first = self._rows.next_row
        rows = np.arange(first, first + len(entries), dtype=np.int64)
        was_trained = self._vectors.trained
        self._vectors.add(rows, vectors)
        self._rows.put(rows, entries)
        if self._vectors.trained != was_trained:
            self._rewrite = True
        if self._saved is None or self._rewrite:
            return
        self._unsaved.append((rows, vectors))
        if self._vectors.trained and self._tail_is_long():
            # Cheaper to write the faiss index again than to keep so many vectors for its tail.
            self._rewrite = True
            self._unsaved = []

    def _tail_is_long(self) -> bool:
        assert self._saved is not None
        tail = sum(part.count for part in self._saved.parts if part.kind == "vectors")
        tail += sum(len(rows) for rows, _ in self._unsaved)
        return tail > max(1024, len(self._rows) // 4)

    def _drop(self, rows: list[int]) -> None:
        if not rows:
            return
        if self._lexical is not None:
            worded = [(row, self._rows[row][1]) for row in rows if row < self._worded]
            self._lexical.remove(worded)
        for row in rows:
            self._rows.remove(row)
        self._vectors.remove(np.asarray(rows, np.int64), self._rows.alive)
        self._removed.extend(rows)

    # --- saving and loading

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the index into a directory; into its own, only what changed since.

        An interrupted save leaves the index that was there. ValueError when the directory holds anything
        but an index, or an index that another process changed since this one read it.
        """
        self._writable()
        target = Path(directory)
        with self._lock:
            there = store.check_target(target)
            generation = there["generation"] if there else None
            target.mkdir(parents=True, exist_ok=True)
            place = os.path.realpath(target)
            saved = self._saved
            if saved is not None and (saved.place != place or generation is None):
                saved = None
            if saved is not None and saved.generation != generation:
                raise ValueError(
                    f"{str(target)!r} was changed by another since this index was read; "
                    "load it again, or save elsewhere"
                )
            parts = self._new_parts(target, saved)
            if parts is None:
                return
            settings = {
                "factory": self.factory,
                "metric": self.metric,
                "hybrid": self.hybrid,
                "effort": self._vectors.effort,
                "dim": self._vectors.dim,
                "fingerprint": self._fingerprint,
                "chunks": len(self._rows),
                "next_row": self._rows.next_row,
            }
            manifest = store.commit(target, settings, parts, generation)
            self._saved = _Saved(place, manifest["generation"], manifest["parts"])
            self._unsaved = []
            self._rewrite = self._whole = False
            if not any(part.kind == "removed" for part in parts):
                self._removed = []

    def _new_parts(self, target: Path, saved: _Saved | None) -> list[store.Part] | None:
        """Write what is new and return all parts; None when nothing changed."""
        whole = (
            saved is None
            or self._whole
            or not store.intact(target, saved.parts)
            or 4 * len(self._removed) > len(self._rows)
        )
        if whole or saved is None:
            main = self._vector_parts(target)
            return [*self._chunk_parts(target, []), *main]
        by_kind = {
            kind: [part for part in saved.parts if part.kind == kind]
            for kind in ("chunks", "vectors", "main", "removed")
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
        if self._rewrite:
            vectors = self._vector_parts(target)
        else:
            vectors = [*self._tail_parts(target, by_kind["vectors"]), *by_kind["main"]]
        before = [part for parts in by_kind.values() for part in parts]
        now = [*chunks, *vectors, *removed]
        return None if set(now) == set(before) else now

    def _chunk_parts(self, target: Path, before: list[store.Part]) -> list[store.Part]:
        stop = self._rows.next_row
        added = sum(1 for _ in self._rows.live(before[-1].stop if before else 0))
        if before and not added:
            return before
        kept = before[: store.merged(before, added)]
        first = kept[-1].stop if kept else 0
        rows = list(self._rows.live(first))
        part = store.write_part(
            target,
            "chunks",
            (first, stop),
            len(rows),
            lambda path: store.write_chunks(path, ((row, self._rows[row]) for row in rows)),
        )
        return [*kept, part]

    def _vector_parts(self, target: Path) -> list[store.Part]:
        """All vectors: the faiss index once it is trained, and those that wait for training."""
        parts = []
        span = (0, self._rows.next_row)
        if self._vectors.trained:
            self._vectors.flush()
            count = self._vectors.indexed
            parts = [store.write_part(target, "main", span, count, self._vectors.write)]
        elif len(self._vectors.exact):
            parts = [self._vector_part(target, self._vectors.exact.blocks, span)]
        return parts

    def _vector_part(
        self, target: Path, blocks: list[tuple[Ints, Floats]], span: tuple[int, int]
    ) -> store.Part:
        count = sum(len(rows) for rows, _ in blocks)
        return store.write_part(
            target,
            "vectors",
            span,
            count,
            lambda path: store.write_vectors(path, self._vectors.dim, blocks),
        )

    def _tail_parts(self, target: Path, before: list[store.Part]) -> list[store.Part]:
        """Vectors added since the faiss index was written, or before it is."""
        added = sum(len(rows) for rows, _ in self._unsaved)
        if not added:
            return before
        kept = before[: store.merged(before, added)]
        blocks = []
        for part in before[len(kept) :]:
            for batch in store.read_arrow(store.verify(target, part), mmap=False):
                blocks.append(store.vectors_of(batch, self._vectors.dim))
        live = []
        for rows, vectors in [*blocks, *self._unsaved]:
            there = self._rows.alive[rows]
            live.append((rows[there], vectors[there]))
        first = kept[-1].stop if kept else 0
        return [*kept, self._vector_part(target, live, (first, self._rows.next_row))]

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        embedder: Embedder,
        mmap: bool = False,
        threads: int = 1,
    ) -> ChunkIndex:
        """Open what `save` wrote, after checking every file against its checksum.

        mmap: leave vectors and texts on disk, to read only; ids, and once filtered the metadata, are in
        memory, and the words go into a temporary file with the first search by word. ValueError when a
        file is missing, damaged or of a newer version, or when the embedder is not the one it was
        built with.
        """
        path = Path(directory)
        manifest = store.read_manifest(path)
        while True:
            if manifest is None:
                raise ValueError(
                    f"{str(path)!r} holds no {store.MANIFEST}; give a directory ChunkIndex.save wrote"
                )
            try:
                return cls._open(path, manifest, embedder, mmap, threads)
            except ValueError:
                # A save may have replaced parts while they were read.
                newer = store.read_manifest(path)
                if newer is None or newer["generation"] == manifest["generation"]:
                    raise
                manifest = newer

    @classmethod
    def _open(
        cls, path: Path, manifest: dict[str, Any], embedder: Embedder, mmap: bool, threads: int
    ) -> ChunkIndex:
        for name, mine in (("dim", embedder.dim), ("fingerprint", embedder.fingerprint)):
            if mine != manifest[name]:
                raise ValueError(
                    f"embedder.{name}={mine!r}, but {str(path)!r} was built with {manifest[name]!r}; "
                    "give that embedder, or build the index again"
                )
        files = [(part, store.verify(path, part)) for part in manifest["parts"]]
        index = cls(
            embedder,
            manifest["factory"],
            manifest["metric"],
            manifest["hybrid"],
            threads,
            manifest["effort"],
        )
        removed = np.zeros(manifest["next_row"], bool)
        for part, file in files:
            if part.kind == "removed":
                gone = store.read_removed(file)
                removed[gone] = True
                index._removed = gone.tolist()
        if mmap:
            index._mapped = True
            index._rows = MappedRows()
            if index._lexical is not None:
                index._lexical.close()
                index._lexical = Lexical(on_disk=True)
        for part, file in files:
            if part.kind == "chunks":
                index._read_chunks(file, removed)
        index._rows.skip_to(manifest["next_row"])
        # The faiss index first: a tail goes into it.
        for part, file in sorted(files, key=lambda item: item[0].kind != "main"):
            if part.kind == "main":
                index._vectors.read(file, mmap, index._rows.alive)
            elif part.kind == "vectors":
                index._read_vectors(file, mmap)
        if not len(index._rows) == index._vectors.live == manifest["chunks"]:
            raise store.damaged(path / store.MANIFEST, "its counts do not match its parts")
        parts = manifest["parts"]
        index._saved = _Saved(os.path.realpath(path), manifest["generation"], parts)
        return index

    def _read_chunks(self, file: Path, removed: Mask) -> None:
        for batch in store.read_arrow(file, self._mapped):
            if isinstance(self._rows, MappedRows):
                self._rows.map(batch, removed)
                continue
            rows = batch.column("row").to_numpy()
            columns = [batch.column(name).to_pylist() for name in ("id", "text", "metadata")]
            kept = ~removed[rows]
            entries = zip(*columns, strict=True)
            self._rows.put(
                rows[kept], [entry for entry, keep in zip(entries, kept, strict=True) if keep]
            )

    def _read_vectors(self, file: Path, mmap: bool) -> None:
        for batch in store.read_arrow(file, mmap):
            rows, vectors = store.vectors_of(batch, self._vectors.dim)
            there = self._rows.alive[rows]
            if not there.all() and not mmap:
                rows, vectors = rows[there], vectors[there]
            if mmap:
                self._vectors.map_tail(rows, vectors, int(there.sum()))
            else:
                self._vectors.add(rows, vectors)


@dataclass(frozen=True)
class _Saved:
    """The directory an index was saved to or loaded from."""

    place: str
    generation: str
    parts: list[store.Part]


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; give 1 or more")
