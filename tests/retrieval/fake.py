"""An embedder for tests: a text is the sum of its words' fixed random vectors."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class WordVectors:
    """Unnormalised, so that the metrics differ; the word "zero" alone gives the zero vector."""

    def __init__(self, dim: int = 16, fingerprint: str = "words-1") -> None:
        self.dim = dim
        self.fingerprint = fingerprint
        self.known: dict[str, NDArray[np.float32]] = {"zero": np.zeros(dim, np.float32)}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return np.stack([np.sum([self.word(w) for w in text.split()], axis=0) for text in texts])

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.encode(texts)

    def word(self, word: str) -> NDArray[np.float32]:
        if word not in self.known:
            random = np.random.default_rng(zlib.crc32(word.encode("utf-8", "replace")))
            self.known[word] = random.standard_normal(self.dim).astype(np.float32)
        return self.known[word]


def corpus(count: int, seed: int = 0, words: int = 200) -> list[str]:
    """Texts of eight words, each with a number of its own."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, words, (count, 8))
    return [" ".join(f"w{w}" for w in line) + f" n{seed}x{n}" for n, line in enumerate(drawn)]
