"""Vectors in an index of faiss's: the only file of the package that imports faiss, and only on first use.

The choices rest on measurements by benchmarks/retrieval.py (384 dimensions, one core).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from memlm.retrieval import store
from memlm.retrieval.codes import Float32, Floats, Precision, codes_of
from memlm.retrieval.exact import ExactVectors, Ints, Kept, Mask, best_of
from memlm.retrieval.vectors import CodedVectors, Vectors

_SCALAR = r"SQ(?:4|6|8|fp16|bf16)"
# faiss takes more, and ends the process for some of it: no parts, no lists, graphs of less than two links.
_MANY = "[1-9][0-9]*"
_CODES = rf"(?:Flat|{_SCALAR}|PQ{_MANY}(?:x[4-8])?)"
_GRAPH = rf"HNSW(?:[2-9]|[1-9][0-9]+)(?:,Flat|_{_SCALAR})?"
_FACTORY = re.compile(rf"{_CODES}|{_GRAPH}|IVF(?P<lists>{_MANY}),{_CODES}")


def _faiss() -> Any:
    # Imported only with vectors: faiss brings its own OpenMP. Its annotations lack half its names.
    import faiss

    return faiss


@contextmanager
def _faiss_threads(count: int) -> Iterator[None]:
    """Let faiss use `count` threads, and restore its setting, which OpenMP keeps per thread."""
    faiss = _faiss()

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


class FaissVectors(Vectors):
    """Vectors by row: a faiss index, and beside it those that wait for training or lie in a tail.

    Removed vectors leave faiss's index with the next search or write; HNSW and mapped files cannot remove,
    so there a mask hides them.
    """

    def __init__(self, factory: str, dim: int, effort: int | None, threads: int) -> None:
        found = _FACTORY.fullmatch(factory) if isinstance(factory, str) else None
        if found is None:
            raise ValueError(
                f"factory={factory!r} is not supported; use Flat, SQ8, SQfp16, PQ48, HNSW32 (2 and "
                "more), IVF1024,Flat or the like"
            )
        super().__init__(Float32(dim), effort, threads)
        self.factory = factory
        # faiss's plain PQ has no filter; IVF's PQ with a single list does the same work and has one.
        self._factory = f"IVF1,{factory}" if factory.startswith("PQ") else factory
        lists = int(found["lists"] or 1)
        bits = re.search(r"PQ\d+(?:x(\d))?", factory)
        centroids = 2 ** int(bits[1] or 8) if bits else 1
        self._train_least = max(lists, centroids)
        self._main = self._empty_index()
        if not self._main.is_trained:
            # k-means wants 39 points per centroid; the ranges of scalar quantisers need fewer.
            self.train_at = max(39 * lists if lists > 1 else 0, 39 * centroids if bits else 0, 4096)
        self._to_remove: list[int] = []  # removed, still to leave faiss's index
        self._num_masked = 0  # removed, but they cannot leave it

    def _empty_index(self) -> Any:
        """An empty faiss index that takes row numbers."""
        faiss = _faiss()

        try:
            main = faiss.index_factory(self.dim, self._factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"factory={self.factory!r} does not suit embedder.dim={self.dim} ({reason}); "
                "PQ needs a number that divides it"
            ) from error
        if isinstance(main, faiss.IndexIVF):
            # Silences faiss's own warning; train_at and check_trainable see to the number of points.
            main.cp.min_points_per_centroid = 1
            if hasattr(main, "pq"):
                main.pq.cp.min_points_per_centroid = 1
                # It reorders the codes for a filter by Hamming distance, which is not used here, and takes
                # longer than all other training.
                main.do_polysemous_training = False
            return main
        return faiss.IndexIDMap(main)

    @property
    def _inner_index(self) -> Any:
        """faiss's own index inside the one that maps row numbers."""
        faiss = _faiss()

        main = self._main
        return faiss.downcast_index(main.index) if isinstance(main, faiss.IndexIDMap) else main

    @property
    def trained(self) -> bool:
        return bool(self._main.is_trained)

    @property
    def has_main(self) -> bool:
        return self.trained

    @property
    def waiting(self) -> int:
        return len(self.exact)

    @property
    def indexed(self) -> int:
        return int(self._main.ntotal)

    @property
    def live(self) -> int:
        indexed = self.indexed - len(self._to_remove) - self._num_masked
        return indexed + len(self.exact) - self._num_masked_in_tail

    @property
    def untouched(self) -> bool:
        return not self.indexed and not len(self.exact) and (not self.train_at or not self.trained)

    @property
    def bytes(self) -> int:
        faiss = _faiss()

        core = self._inner_index
        total = self.exact.bytes
        if isinstance(core, faiss.IndexHNSW):
            storage = faiss.downcast_index(core.storage)
            total += self.indexed * (storage.sa_code_size() + 16) + 4 * core.hnsw.neighbors.size()
        elif isinstance(core, faiss.IndexIVF):
            total += self.indexed * (core.code_size + 8) + core.nlist * self.dim * 4
        else:
            total += self.indexed * (core.sa_code_size() + 8)
        return int(total)

    def check_trainable(self, count: int) -> None:
        if not self.train_at:
            raise ValueError(f"factory={self.factory!r} needs no training; leave train out")
        if self.trained:
            raise ValueError("the index is trained; train a new one to train on other texts")
        if count < self._train_least:
            raise ValueError(
                f"texts has {count} entries, but factory={self.factory!r} needs at least "
                f"{self._train_least} to train on; give more"
            )

    def train(self, vectors: Floats) -> None:
        with _faiss_threads(self.threads):
            self._main.train(vectors)
        waiting, self.exact = self.exact.blocks, ExactVectors(self.codes)
        for rows, block in waiting:
            self._add_main(rows, block)

    def add(self, rows: Ints, kept: Kept) -> None:
        if self.trained:
            self._add_main(rows, kept)
            return
        self.exact.add(rows, kept)
        if len(self.exact) >= self.train_at:
            self.train(np.concatenate([block for _, block in self.exact.blocks]))

    def _add_main(self, rows: Ints, vectors: Floats) -> None:
        with _faiss_threads(self.threads):
            self._main.add_with_ids(np.ascontiguousarray(vectors), np.ascontiguousarray(rows))

    def remove(self, rows: Ints, alive: Mask) -> None:
        faiss = _faiss()

        if not self.trained:
            self.exact.remove(alive)
        elif isinstance(self._inner_index, faiss.IndexHNSW):
            self._num_masked += len(rows)
            if 2 * self._num_masked > self.indexed:
                self._rebuild(alive)
        else:
            self._to_remove.extend(rows.tolist())

    def flush(self, alive: Mask) -> None:
        faiss = _faiss()

        if self._to_remove:
            with _faiss_threads(self.threads):
                self._main.remove_ids(faiss.IDSelectorBatch(np.asarray(self._to_remove, np.int64)))
            self._to_remove = []

    def compact(self, alive: Mask) -> None:
        """Drop all removed rows, which for HNSW means building it again."""
        self.flush(alive)
        if self._num_masked:
            self._rebuild(alive)

    def _rebuild(self, alive: Mask) -> None:
        """Build HNSW again without its removed rows."""
        old = self._inner_index
        rows = self._rows_inside()
        there = alive[rows]
        vectors = old.reconstruct_n(0, old.ntotal)[there]
        main = self._empty_index()
        with _faiss_threads(self.threads):
            if not main.is_trained:
                main.train(vectors if len(vectors) else np.zeros((1, self.dim), np.float32))
            if len(vectors):
                main.add_with_ids(vectors, rows[there])
        self._main = main
        self._num_masked = 0

    def _rows_inside(self) -> Ints:
        """(n,) the row numbers in faiss's index, in its order."""
        faiss = _faiss()

        main = self._main
        if isinstance(main, faiss.IndexIDMap):
            return faiss.vector_to_array(main.id_map)
        lists = main.invlists
        found = [np.zeros(0, np.int64)]
        for number in range(main.nlist):
            size = lists.list_size(number)
            if size:
                found.append(faiss.rev_swig_ptr(lists.get_ids(number), size).copy())
        return np.concatenate(found)

    def write(self, path: Path) -> None:
        faiss = _faiss()

        faiss.write_index(self._main, str(path))

    def read(self, path: Path, mmap: bool, alive: Mask) -> None:
        faiss = _faiss()

        flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if mmap else 0
        try:
            main = faiss.read_index(str(path), flags)
        except RuntimeError as error:
            raise store.damaged(path, str(error).strip().splitlines()[-1]) from error
        fresh, own = self._main, self._inner_index
        self._main = main
        # A flat index read from a file comes back as the more specific class.
        same = type(main) is type(fresh) and isinstance(self._inner_index, type(own))
        if not same or main.d != self.dim or main.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise store.damaged(path, f"it is no {self._factory} of width {self.dim}")
        rows = self._rows_inside()
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(alive):
            raise store.damaged(path, "it has rows that the index does not have")
        gone = rows[~alive[rows]]
        if mmap or isinstance(self._inner_index, faiss.IndexHNSW):
            self._num_masked = len(gone)
        else:
            self._to_remove = gone.tolist()

    def search(
        self, queries: Floats, k: int, mask: Mask | None, alive: Mask
    ) -> list[list[tuple[int, float]]]:
        self.flush(alive)
        if mask is None and (self._num_masked or self._num_masked_in_tail):
            mask = alive
        found = list(self.exact.search(queries, k, mask))
        found.extend(self._search_main(queries, k, mask))
        return best_of(found, len(queries), k)

    def _search_main(self, queries: Floats, k: int, mask: Mask | None) -> list[tuple[Floats, Ints]]:
        faiss = _faiss()

        allowed = self.indexed
        if mask is not None:
            waiting = sum(int(mask[rows].sum()) for rows, _ in self.exact.blocks)
            allowed = int(mask.sum()) - waiting
        k = min(k, allowed)
        if k <= 0:
            return []
        core = self._inner_index
        approximate = isinstance(core, (faiss.IndexHNSW, faiss.IndexIVF))
        # With few rows allowed, or nearly all wanted, comparing with each is cheaper, and exact.
        each = not approximate or 10 * allowed <= self.indexed or 4 * k > self.indexed
        with _faiss_threads(self.threads):
            scores, rows = self._faiss_search(queries, k, mask, each)
            short = (rows < 0).any(axis=1)
            if short.any() and not each:
                scores[short], rows[short] = self._faiss_search(queries[short], k, mask, True)
        scores[rows < 0] = -np.inf
        return [(scores, rows)]

    def _faiss_search(
        self, queries: Floats, k: int, mask: Mask | None, each: bool
    ) -> tuple[Floats, Ints]:
        """faiss's search, (n, k) scores and rows; `each` compares with every allowed vector."""
        faiss = _faiss()

        main, core = self._main, self._inner_index
        positions = None
        if each and isinstance(core, faiss.IndexHNSW):
            # In the graph's storage, past the graph itself; vectors go by position there.
            positions = self._rows_inside()
            mask = None if mask is None else mask[positions]
            main = core = faiss.downcast_index(core.storage)
        options: dict[str, Any] = {}
        if mask is not None:
            bits = np.packbits(mask, bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(bits)
        params: Any = None
        if isinstance(core, faiss.IndexIVF):
            probes = self.effort or max(8, core.nlist // 16)
            options["nprobe"] = core.nlist if each else min(core.nlist, probes)
            params = faiss.SearchParametersIVF(**options)
        elif isinstance(core, faiss.IndexHNSW):
            options["efSearch"] = max(self.effort or 64, 2 * k)
            params = faiss.SearchParametersHNSW(**options)
        elif options:
            params = faiss.SearchParameters(**options)
        scores, rows = main.search(queries, k, params=params)
        if positions is not None:
            rows = np.where(rows < 0, -1, positions[rows])
        return scores, rows


def make_vectors(
    factory: str, dim: int, effort: int | None, threads: int, precision: Precision | None = None
) -> Vectors:
    """An empty store of a factory; a precision other than float32 is for "Flat", and does without faiss."""
    if precision is None or precision == "float32":
        return FaissVectors(factory, dim, effort, threads)
    return CodedVectors(codes_of(precision, dim), effort, threads)
