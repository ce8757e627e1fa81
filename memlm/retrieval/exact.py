"""Vectors compared with a query one by one, in blocks of rows: in memory, or where they lie on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.retrieval import store
from memlm.retrieval.codes import Codes, Floats

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Kept = NDArray[Any]  # (n, codes.width) of codes.dtype


class ExactVectors:
    """Rows and what `codes` keeps of their vectors."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self.blocks: list[tuple[Ints, Kept]] = []

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self.blocks)

    @property
    def bytes(self) -> int:
        return len(self) * (self.codes.bytes_per_vector + 8)

    def add(self, rows: Ints, kept: Kept) -> None:
        """Add (n,) rows and their codes; blocks at most double, so many small adds stay cheap."""
        self.blocks.append((rows, kept))
        while len(self.blocks) > 1 and len(self.blocks[-2][0]) <= len(self.blocks[-1][0]):
            (rows_a, a), (rows_b, b) = self.blocks[-2:]
            self.blocks[-2:] = [(np.concatenate([rows_a, rows_b]), np.concatenate([a, b]))]

    def remove(self, alive: Mask) -> None:
        """Keep rows that are alive."""
        kept = [(rows[alive[rows]], block[alive[rows]]) for rows, block in self.blocks]
        self.blocks = [block for block in kept if len(block[0])]

    def search(self, queries: Floats, k: int, mask: Mask | None) -> Iterator[tuple[Floats, Ints]]:
        """Scores and rows, (n, <=k) each, of every block of at most store.BATCH vectors."""
        for all_rows, all_kept in self.blocks:
            for start in range(0, len(all_rows), store.BATCH):
                rows = all_rows[start : start + store.BATCH]
                scores = self.codes.products(queries, all_kept[start : start + store.BATCH])
                if mask is not None:
                    scores[:, ~mask[rows]] = -np.inf
                if k < len(rows):
                    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                    yield np.take_along_axis(scores, best, 1), rows[best]
                else:
                    yield scores, np.broadcast_to(rows, scores.shape)


def best_of(
    found: list[tuple[Floats, Ints]], queries: int, k: int
) -> list[list[tuple[int, float]]]:
    """Per query the k best (row, score) of several searches, equal scores in order of adding."""
    if not found:
        return [[] for _ in range(queries)]
    scores = np.concatenate([s for s, _ in found], axis=1)
    rows = np.concatenate([r for _, r in found], axis=1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    results = []
    for line, picked in enumerate(order):
        pairs = zip(rows[line, picked].tolist(), scores[line, picked].tolist(), strict=True)
        results.append([(row, score) for row, score in pairs if score > -np.inf])
    return results
