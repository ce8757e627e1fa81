"""An index of chunks: found by meaning (faiss) and by word (BM25), filtered by metadata.

A `ChunkIndex` has one lock, which is also held while its embedder works, as few embedders allow several
threads: threads may add and search at any time, and wait for each other. After `fork()` faiss can hang when
the parent has searched with more than one thread: in forked workers use threads=1 on both sides, or open
the index in the worker. On macOS two OpenMP libraries in a process (torch's and faiss's) can crash it; use
threads=1 there.
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

from memlm.retrieval.arguments import (
    ChunkEntry,
    Value,
    check_id,
    check_ids,
    check_metadata,
    check_texts,
    check_where,
    id_of,
)
from memlm.retrieval.base import Embedder, check_precision, document_encoder, query_encoder
from memlm.retrieval.chunk_store import ChunkStore, Key, StoreAddress, StoreSettings
from memlm.retrieval.codes import Floats, Precision
from memlm.retrieval.embedded import EmbeddedStore
from memlm.retrieval.milvus import address_of, saved_address
from memlm.retrieval.store import MANIFEST, read_manifest

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

    embedder: texts to (n, dim) vectors. factory: "Flat" (compares with every vector; right up to some
    200,000 chunks), "SQ8", "SQfp16", "PQ48", "HNSW32", or "IVF1024,Flat" with Flat, SQ or PQ. metric:
    "cosine" (vectors are normalised; a zero vector scores 0) or "inner_product". hybrid: fuse the vector
    search with BM25 by reciprocal rank, so that rare exact words are found whatever the embedder.
    threads: of faiss. effort: lists probed by IVF, efSearch of HNSW; None chooses.

    precision: how "Flat" keeps a number of a vector: "float32" (exact), or "ternary" (-a, 0 or a: five to a
    byte, for bags of words). None takes the embedder's: ternary for `HashingEmbedder`, else float32.

    store: where the chunks are, if not in this index: a file "chunks.db" (Milvus Lite), the address
    "http://host:19530" of a Milvus cluster, or a `MilvusStore`. What is there already is in the index.
    factory, threads, effort and precision are of the store in memory.

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
        precision: Precision | None = None,
        store: str | os.PathLike[str] | StoreAddress | None = None,
    ) -> None:
        settings = _settings(embedder, metric, hybrid)
        if store is not None:
            _refuse_with_store(
                factory=(factory, "Flat"), threads=(threads, 1), effort=(effort, None)
            )
            if precision not in (None, "float32"):
                raise ValueError(f"precision={precision!r}: a store keeps float32; leave it out")
            self._use(embedder, settings, address_of(store).open(settings, create=True))
            return
        _check_faiss(threads, effort)
        chosen = check_precision(embedder, factory, precision)
        self._use(embedder, settings, EmbeddedStore(settings, factory, chosen, effort, threads))

    def _use(self, embedder: Embedder, settings: StoreSettings, kept: ChunkStore) -> None:
        """Be an index over `kept`, which was opened with `settings`."""
        self.embedder = embedder
        self.factory = kept.factory
        self.metric = settings.metric
        self.hybrid = settings.hybrid
        self.precision = kept.precision
        self._dim = settings.dim
        self._fingerprint = settings.fingerprint
        self._lock = threading.RLock()
        self._store = kept

    # --- reading it

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, id: object) -> bool:
        try:
            name = check_id(id, "id")
        except ValueError:
            return False
        with self._lock:
            return bool(self._store.find([name]))

    def __repr__(self) -> str:
        return f"ChunkIndex(factory={self.factory!r}, metric={self.metric!r}, chunks={len(self)})"

    @property
    def outlives_process(self) -> bool:
        """Whether chunks stay where they are when this process ends, saved or not: in a `store` they do."""
        return self._store.outlives_process

    def get(self, id: str | int) -> Hit:
        """The chunk of an id, with score 0. KeyError when there is none."""
        with self._lock:
            keys = self._store.find([check_id(id, "id")]).values()
            for entry in self._store.entries(list(keys)):
                if entry is not None:
                    return _hit(entry, 0.0)
            raise KeyError(f"id={id!r} is not in the index")

    @property
    def bytes(self) -> int:
        """Bytes of vectors, word index, texts and rows in memory; Python's own objects are estimated."""
        return sum(self.info()["bytes"].values())

    def info(self) -> dict[str, Any]:
        """Settings, counts and bytes, as plain values."""
        with self._lock:
            return {
                "factory": self.factory,
                "precision": self.precision,
                "metric": self.metric,
                "hybrid": self.hybrid,
                "dim": self._dim,
                "fingerprint": self._fingerprint,
                "chunks": len(self._store),
                **self._store.info(),
            }

    # --- changing it

    def add(
        self,
        texts: Sequence[str],
        ids: Sequence[str | int] | None = None,
        metadata: Sequence[Mapping[str, Value]] | None = None,
    ) -> list[str | int]:
        """Add texts; returns their ids. All are added, or none.

        ids: unique text or ints (7 and "7" are two ids), made when None. metadata: one flat mapping per
        text with values of str, int, float, bool or None. The vectors of one call are in memory at once
        (4 * dim bytes per text): add a large corpus in calls of some ten thousand.
        """
        self._store.check_writable()
        texts = check_texts(texts, "texts")
        given = None if ids is None else self._checked_ids(ids, texts)
        notes = check_metadata(metadata, len(texts))
        with self._lock:
            self._refuse_ids_there(given or [])
            vectors = self._checked_vectors(texts, document_encoder(self.embedder))
            names = given if given is not None else self._store.new_ids(len(texts))
            self._store.put(list(zip(names, texts, notes, strict=True)), vectors)
        return [id_of(name) for name in names]

    def update(
        self,
        ids: Sequence[str | int],
        texts: Sequence[str],
        metadata: Sequence[Mapping[str, Value]] | None = None,
    ) -> None:
        """Replace the texts of existing chunks; their metadata stays when `metadata` is None."""
        self._store.check_writable()
        texts = check_texts(texts, "texts")
        names = self._checked_ids(ids, texts)
        notes = check_metadata(metadata, len(texts))
        with self._lock:
            old = self._keys_of(names)
            vectors = self._checked_vectors(texts, document_encoder(self.embedder))
            if metadata is None:
                notes = [entry[2] if entry else "" for entry in self._store.entries(old)]
            self._store.put(list(zip(names, texts, notes, strict=True)), vectors)

    def remove(self, ids: Sequence[str | int]) -> None:
        """Remove chunks. ValueError, and nothing removed, when an id is not in the index."""
        self._store.check_writable()
        names = check_ids(ids)
        with self._lock:
            self._store.remove(self._keys_of(names))

    def train(self, texts: Sequence[str]) -> None:
        """Train the factory on texts like those to come; they are not added."""
        self._store.check_writable()
        texts = check_texts(texts, "texts")
        with self._lock:
            self._store.check_trainable(len(texts))
            self._store.train(self._checked_vectors(texts, document_encoder(self.embedder)))

    def compact(self) -> None:
        """Free what removed chunks still hold; the next save writes the directory anew in few parts."""
        self._store.check_writable()
        with self._lock:
            self._store.compact()

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
        (1 equals 1.0 but not True; a chunk without the key is left out). hybrid: None is as the index was
        made. The score of a hybrid search is the fused 1 / (60 + rank) of both halves, otherwise the
        similarity of the vectors.
        """
        queries = check_texts(queries, "queries")
        _check_count("k", k)
        wanted = check_where(where)
        by_word = self.hybrid if hybrid is None else hybrid
        if by_word and not self.hybrid:
            raise ValueError("hybrid=True, but the index was made with hybrid=False; make it anew")
        if not queries or not len(self):
            return [[] for _ in queries]
        with self._lock:
            vectors = self._checked_vectors(queries, query_encoder(self.embedder))
            depth = max(2 * k, 50) if by_word else k
            dense, lexical = self._store.search(
                vectors, queries if by_word else None, depth, wanted
            )
            if by_word:
                ranked = [_fuse(*halves, k) for halves in zip(dense, lexical, strict=True)]
            else:
                ranked = [[(key, s, s, None) for key, s in found] for found in dense]
            entries = iter(self._store.entries([line[0] for best in ranked for line in best]))
            return [
                [_hit(entry, *line[1:]) for line in best if (entry := next(entries)) is not None]
                for best in ranked
            ]

    def likeness(self, query: str, texts: Sequence[str]) -> Floats:
        """(n,) similarity of texts, which need not be in the index, to a query: products of vectors."""
        with self._lock:
            documents = document_encoder(self.embedder)(texts)
            return documents @ query_encoder(self.embedder)([query])[0]

    # --- checks and steps of a change

    def _checked_ids(self, ids: Sequence[str | int], texts: list[str]) -> list[str]:
        names = check_ids(ids)
        if len(names) != len(texts):
            raise ValueError(
                f"ids has {len(names)} entries for {len(texts)} texts; give one per text"
            )
        return names

    def _refuse_ids_there(self, names: list[str]) -> None:
        for name in self._store.find(names):
            raise ValueError(
                f"ids has {id_of(name)!r}, which is in the index; use update, or another"
            )

    def _keys_of(self, names: list[str]) -> list[Key]:
        keys = self._store.find(names)
        missing = [name for name in names if name not in keys]
        if missing:
            raise ValueError(
                f"ids has {id_of(missing[0])!r}, which is not in the index; add it first"
            )
        return [keys[name] for name in names]

    def _check_fingerprint(self, fingerprint: str) -> None:
        """Refuse vectors of another embedder than the one the index was built with."""
        if fingerprint == self._fingerprint:
            return
        if self._store.untouched:
            self._fingerprint = fingerprint
            return
        raise ValueError(
            f"embedder.fingerprint={fingerprint!r} differs from the index's {self._fingerprint!r}: "
            "the embedder changed; build the index again with it"
        )

    def _checked_vectors(self, texts: list[str], encode: Any) -> Floats:
        """(n, dim) C-contiguous float32, normalised for cosine. ValueError when unusable."""
        self._check_fingerprint(self.embedder.fingerprint)
        if not texts:
            return np.zeros((0, self._dim), np.float32)
        vectors = np.asarray(encode(texts))
        if vectors.shape != (len(texts), self._dim) or vectors.dtype.kind != "f":
            raise ValueError(
                f"embedder returned {vectors.dtype} of shape {vectors.shape} for {len(texts)} texts; "
                f"return float32 of shape ({len(texts)}, {self._dim})"
            )
        vectors = np.array(vectors, np.float32, order="C")
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        # Beyond this a product of two vectors can leave float32; NaN fails the comparison too.
        usable = norms < 1e19
        if not usable.all():
            first = int(np.flatnonzero(~usable)[0])
            raise ValueError(
                f"embedder returned NaN, infinite or huge values for text {first}; "
                "correct the embedder, or leave the text out"
            )
        if self.metric == "cosine":
            vectors /= np.where(norms > 0, norms, 1)[:, None]
        return vectors

    # --- saving and loading

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the index into a directory; into the one it was saved to last, only what changed since.

        An interrupted save leaves the index that was there. ValueError when the directory holds anything
        but an index, or an index that another process changed since this one read it. With a `store`, its
        address is written, and neither chunks nor a token.
        """
        self._store.check_writable()
        with self._lock:
            settings = {
                "metric": self.metric,
                "hybrid": self.hybrid,
                "dim": self._dim,
                "fingerprint": self._fingerprint,
                "chunks": len(self._store),
            }
            self._store.save(Path(directory), settings)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        embedder: Embedder,
        mmap: bool = False,
        threads: int = 1,
        store: str | os.PathLike[str] | StoreAddress | None = None,
    ) -> ChunkIndex:
        """Open what `save` wrote, after checking every file against its checksum.

        mmap: leave vectors, texts and words on disk, read-only. Ids are in memory, and metadata after the
        first filtered search. A word index that lacks changes is brought up to date in a temporary file.
        ValueError when a file is missing, damaged or of a newer version, or when the embedder is not the
        one the index was built with. store: where to look instead of the saved address, for a cluster that
        has moved or wants a token; a text is another address for the saved collection. Without it, the
        address in the directory is connected to, so load only what you trust. ValueError when it holds
        fewer chunks than when the index was saved.
        """
        path = Path(directory)
        manifest = read_manifest(path)
        while True:
            if manifest is None:
                raise ValueError(
                    f"{str(path)!r} holds no {MANIFEST}; give a directory ChunkIndex.save wrote"
                )
            try:
                return cls._load_parts(path, manifest, embedder, mmap, threads, store)
            except ValueError:
                # A save may have replaced parts while we read them.
                newer = read_manifest(path)
                if newer is None or newer["generation"] == manifest["generation"]:
                    raise
                manifest = newer

    @classmethod
    def _load_parts(
        cls,
        path: Path,
        manifest: dict[str, Any],
        embedder: Embedder,
        mmap: bool,
        threads: int,
        elsewhere: str | os.PathLike[str] | StoreAddress | None,
    ) -> ChunkIndex:
        for name, mine in (("dim", embedder.dim), ("fingerprint", embedder.fingerprint)):
            if mine != manifest[name]:
                raise ValueError(
                    f"embedder.{name}={mine!r}, but {str(path)!r} was built with {manifest[name]!r}; "
                    "give that embedder, or build the index again"
                )
        settings = _settings(embedder, manifest["metric"], manifest["hybrid"])
        kept: ChunkStore
        if "store" in manifest:
            _refuse_with_store(mmap=(mmap, False), threads=(threads, 1))
            saved = manifest["store"]
            place = saved_address(saved) if elsewhere is None else address_of(elsewhere, saved)
            kept = place.open(settings, create=False)
            if len(kept) < manifest["chunks"]:
                raise ValueError(
                    f"the store has {len(kept):,} chunks, and had {manifest['chunks']:,} when "
                    f"{str(path)!r} was saved; restore it, or open it with "
                    "ChunkIndex(embedder, store=...) and save again"
                )
        elif elsewhere is not None:
            raise ValueError(
                f"{str(path)!r} holds its chunks itself; leave store={elsewhere!r} out"
            )
        else:
            kept = _read_embedded(path, manifest, embedder, settings, mmap, threads)
        index = cls.__new__(cls)
        index._use(embedder, settings, kept)
        return index


def _read_embedded(
    path: Path,
    manifest: dict[str, Any],
    embedder: Embedder,
    settings: StoreSettings,
    mmap: bool,
    threads: int,
) -> EmbeddedStore:
    factory, effort = manifest["factory"], manifest["effort"]
    # The first version knew no other.
    precision = manifest.get("precision", "float32" if factory == "Flat" else None)
    _check_faiss(threads, effort)
    chosen = check_precision(embedder, factory, precision)
    kept = EmbeddedStore(settings, factory, chosen, effort, threads, mmap)
    kept.read(path, manifest)
    return kept


def _refuse_with_store(**given: tuple[Any, Any]) -> None:
    """ValueError for an argument, given as (value, default), that a store elsewhere cannot obey."""
    for name, (value, default) in given.items():
        if value != default:
            raise ValueError(
                f"{name}={value!r} is for an index that holds its chunks itself; leave it out with a store"
            )


def _settings(embedder: Embedder, metric: str, hybrid: bool) -> StoreSettings:
    if metric not in METRICS:
        raise ValueError(f"metric={metric!r} is unknown; use one of {', '.join(METRICS)}")
    _check_count("embedder.dim", embedder.dim)
    return StoreSettings(int(embedder.dim), metric, bool(hybrid), embedder.fingerprint)


def _check_faiss(threads: int, effort: int | None) -> None:
    _check_count("threads", threads)
    if effort is not None:
        _check_count("effort", effort)


def _fuse(
    dense: list[tuple[Key, float]], lexical: list[tuple[Key, float]], k: int
) -> list[tuple[Key, float, float | None, float | None]]:
    """The k best of both lists, each (key, score) and best first, by reciprocal rank.

    Key, fused score, similarity and BM25 of each.
    """
    fused: dict[Key, float] = {}
    for found in (dense, lexical):
        for rank, (key, _) in enumerate(found, start=1):
            fused[key] = fused.get(key, 0.0) + 1 / (RRF + rank)
    similarity, bm25 = dict(dense), dict(lexical)

    def order(item: tuple[Key, float]) -> tuple[float, bool, Key]:
        # The first hits of both halves tie: the one sharing a word with the query is the safer answer.
        return -item[1], item[0] not in bm25, item[0]

    best = sorted(fused.items(), key=order)[:k]
    return [(key, score, similarity.get(key), bm25.get(key)) for key, score in best]


def _hit(
    entry: ChunkEntry, score: float, dense: float | None = None, lexical: float | None = None
) -> Hit:
    ident, text, notes = entry
    return Hit(text, id_of(ident), score, json.loads(notes) if notes else {}, dense, lexical)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer; give 1 or more")
