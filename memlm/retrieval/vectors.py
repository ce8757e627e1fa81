"""Vectors by row number: what every store offers, and the one that compares with each vector itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

from memlm.retrieval import store
from memlm.retrieval.codes import Codes, Floats
from memlm.retrieval.exact import ExactVectors, Ints, Kept, Mask, best_of


class Vectors(ABC):
    """Vectors by row, some of them in `exact`.

    A row comes with what `encode` makes of its vector, and `alive` says which rows were not removed.
    threads, effort: of faiss. train_at: how many rows wait before a kind that learns is trained.
    """

    train_at = 0

    def __init__(self, codes: Codes, effort: int | None, threads: int) -> None:
        self.dim = codes.dim
        self.effort = effort
        self.threads = threads
        self.exact = ExactVectors(codes)
        self._num_masked_in_tail = 0

    @property
    def codes(self) -> Codes:
        return self.exact.codes

    def encode(self, vectors: Floats) -> Kept:
        """(n, width) what is kept of (n, dim) float32 vectors."""
        return self.codes.encode(vectors)

    def map_tail(self, rows: Ints, kept: Kept, live: int) -> None:
        """Add vectors that are searched where they are, on disk."""
        self.exact.blocks.append((rows, kept))
        self._num_masked_in_tail += len(rows) - live

    @property
    @abstractmethod
    def trained(self) -> bool:
        """Whether nothing is left to learn."""

    @property
    @abstractmethod
    def indexed(self) -> int:
        """Vectors in faiss's index, removed ones included."""

    @property
    @abstractmethod
    def has_main(self) -> bool:
        """Whether faiss's index holds the vectors, and is a file of its own when they are saved."""

    @property
    @abstractmethod
    def waiting(self) -> int:
        """Vectors that belong into faiss's index and are not there yet."""

    @property
    @abstractmethod
    def live(self) -> int:
        """Vectors that are not removed."""

    @property
    @abstractmethod
    def untouched(self) -> bool:
        """Whether nothing depends on the embedder yet."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Bytes of codes, row numbers, links and centroids, mapped ones included."""

    @abstractmethod
    def check_trainable(self, count: int) -> None:
        """ValueError when the kind learns nothing, has learned, or needs more than `count` vectors."""

    @abstractmethod
    def train(self, vectors: Floats) -> None:
        """Train on (n, dim) vectors, and add those that waited."""

    @abstractmethod
    def add(self, rows: Ints, kept: Kept) -> None:
        """Add (n,) rows, ascending and new, and their (n, width) codes."""

    @abstractmethod
    def remove(self, rows: Ints, alive: Mask) -> None:
        """Remove (n,) rows, of which `alive` says False already."""

    @abstractmethod
    def flush(self, alive: Mask) -> None:
        """Let removed rows leave what is to be searched or written."""

    @abstractmethod
    def compact(self, alive: Mask) -> None:
        """Drop all removed rows."""

    @abstractmethod
    def search(
        self, queries: Floats, k: int, mask: Mask | None, alive: Mask
    ) -> list[list[tuple[int, float]]]:
        """Per query up to k (row, score), best first; equal scores in order of adding.

        mask: (rows,) bool, rows allowed, or None for all; alive: (rows,) bool.
        """

    def write(self, path: Path) -> None:
        """Write faiss's index."""
        raise NotImplementedError("there is no index of faiss's")

    def read(self, path: Path, mmap: bool, alive: Mask) -> None:
        """Read faiss's index of a file whose checksum is right."""
        raise store.damaged(path, "the index has no file of this kind")


class CodedVectors(Vectors):
    """All vectors in codes of our own, compared one by one; nothing to train."""

    def __init__(self, codes: Codes, effort: int | None, threads: int) -> None:
        super().__init__(codes, effort, threads)
        self._num_removed = 0  # still in `exact`

    @property
    def trained(self) -> bool:
        return True

    @property
    def indexed(self) -> int:
        return 0

    @property
    def has_main(self) -> bool:
        return False

    @property
    def waiting(self) -> int:
        return 0

    @property
    def live(self) -> int:
        return len(self.exact) - self._num_removed - self._num_masked_in_tail

    @property
    def untouched(self) -> bool:
        return not len(self.exact)

    @property
    def bytes(self) -> int:
        return self.exact.bytes

    def check_trainable(self, count: int) -> None:
        raise ValueError("factory='Flat' needs no training; leave train out")

    def train(self, vectors: Floats) -> None:
        self.check_trainable(len(vectors))

    def add(self, rows: Ints, kept: Kept) -> None:
        self.exact.add(rows, kept)

    def remove(self, rows: Ints, alive: Mask) -> None:
        self._num_removed += len(rows)

    def flush(self, alive: Mask) -> None:
        if self._num_removed:
            self.exact.remove(alive)
            self._num_removed = 0

    def compact(self, alive: Mask) -> None:
        self.flush(alive)

    def search(
        self, queries: Floats, k: int, mask: Mask | None, alive: Mask
    ) -> list[list[tuple[int, float]]]:
        self.flush(alive)
        if mask is None and self._num_masked_in_tail:
            mask = alive
        return best_of(list(self.exact.search(queries, k, mask)), len(queries), k)
