"""How a vector is kept, number by number: as it is, or as one of three values and a scale.

Three values are enough for bags of hashed words. Such a vector has few large components, its words, and
many small ones, in which words that do not matter collide; keeping the large ones alone finds slightly more
than keeping all (benchmarks/index_size.py), in a twentieth of the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Precision = Literal["float32", "ternary"]

# Rows turned into float32 at once: what they become should stay in the processor's cache.
_ROWS_AT_ONCE = 64
# Vectors are searched for their scale this often; in text it no longer changes after the third time.
_ROUNDS = 6
_PER_BYTE = 5  # 3 ** 5 = 243
_POWERS = 3 ** np.arange(_PER_BYTE, dtype=np.uint8)
# (256, 5) the values of every byte; those that no vector has are zeros.
_VALUES = (np.arange(256)[:, None] // _POWERS % 3 - 1).astype(np.float32)
_VALUES[3**_PER_BYTE :] = 0
_SCALE_BYTES = 4


class Codes(ABC):
    """A way to keep vectors of `dim` numbers: `width` entries of type `dtype` for each."""

    name: ClassVar[Precision]
    dtype: ClassVar[type[np.generic]]
    width: int

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    def bytes_per_vector(self) -> int:
        return self.width * np.dtype(self.dtype).itemsize

    @abstractmethod
    def encode(self, vectors: Floats) -> NDArray[Any]:
        """(n, width) what is kept of (n, dim) vectors."""

    @abstractmethod
    def products(self, queries: Floats, kept: NDArray[Any]) -> Floats:
        """(q, n) products of (q, dim) queries with the vectors kept as (n, width)."""


class Float32(Codes):
    """Vectors as they are."""

    name = "float32"
    dtype = np.float32

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.width = dim

    def encode(self, vectors: Floats) -> NDArray[Any]:
        return vectors

    def products(self, queries: Floats, kept: NDArray[Any]) -> Floats:
        return queries @ kept.T


class Ternary(Codes):
    """Every number as -a, 0 or a: five to a byte, and behind them a, a little-endian float32.

    a and the zeros are those with the least squared error: a is the mean magnitude of the numbers that
    are not zero, and those are the ones above a / 2. Both are found by turns (Lloyd's algorithm).
    """

    name = "ternary"
    dtype = np.uint8

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self._bytes = -(-dim // _PER_BYTE)
        self.width = self._bytes + _SCALE_BYTES

    def encode(self, vectors: Floats) -> NDArray[np.uint8]:
        kept = np.empty((len(vectors), self.width), np.uint8)
        # A digit is the value plus one, so the padding's digit is one.
        digits = np.ones((_ROWS_AT_ONCE, self._bytes * _PER_BYTE), np.uint8)
        for start in range(0, len(vectors), _ROWS_AT_ONCE):
            block = vectors[start : start + _ROWS_AT_ONCE]
            there = slice(start, start + len(block))
            magnitudes = np.abs(block)
            least = magnitudes.mean(axis=1, keepdims=True)
            for _ in range(_ROUNDS):
                large = magnitudes > least
                count = np.maximum(large.sum(axis=1, keepdims=True), 1)
                scale = np.where(large, magnitudes, 0).sum(axis=1, keepdims=True) / count
                least = scale / 2
            values = np.sign(block) * (magnitudes > least)
            digits[: len(block), : self.dim] = values + 1
            grouped = digits[: len(block)].reshape(len(block), self._bytes, _PER_BYTE)
            kept[there, : self._bytes] = grouped @ _POWERS
            kept[there, self._bytes :] = scale.astype("<f4").view(np.uint8)
        return kept

    def products(self, queries: Floats, kept: NDArray[Any]) -> Floats:
        padded = np.zeros((len(queries), self._bytes * _PER_BYTE), np.float32)
        padded[:, : self.dim] = queries
        scores = np.empty((len(queries), len(kept)), np.float32)
        values = np.empty((_ROWS_AT_ONCE, self._bytes, _PER_BYTE), np.float32)
        for start in range(0, len(kept), _ROWS_AT_ONCE):
            block = kept[start : start + _ROWS_AT_ONCE]
            # With mode="clip" numpy writes straight into `out`; a byte cannot be out of range.
            np.take(_VALUES, block[:, : self._bytes], axis=0, out=values[: len(block)], mode="clip")
            flat = values[: len(block)].reshape(len(block), -1)
            scale = np.ascontiguousarray(block[:, self._bytes :]).view("<f4")[:, 0]
            scores[:, start : start + len(block)] = (padded @ flat.T) * scale
        return scores


_KINDS: dict[Precision, type[Codes]] = {"float32": Float32, "ternary": Ternary}
PRECISIONS = tuple(_KINDS)


def codes_of(precision: Precision, dim: int) -> Codes:
    return _KINDS[precision](dim)
