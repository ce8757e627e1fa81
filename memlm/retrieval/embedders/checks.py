"""Checks of an embedder's input and output: texts, and finite vectors of the right shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray


def text_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts in lists of `size`, the last one shorter, taken lazily and checked."""
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts")
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield checked_texts(batch)


def checked_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list. ValueError unless every one is a string."""
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts")
    texts = list(texts)
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{at}] is a {type(text).__name__}; give strings")
    return texts


def checked_vectors(vectors: NDArray[Any], n: int, dim: int, name: str) -> NDArray[np.float32]:
    """The vectors. ValueError naming the embedder unless they are finite float32 (n, dim)."""
    if vectors.shape != (n, dim) or vectors.dtype != np.float32:
        raise ValueError(
            f"{name} gave {vectors.dtype} of shape {vectors.shape}, not float32 of ({n}, {dim}); "
            "use another model or layer"
        )
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"{name} gave values that are not finite; run the model in float32 or bfloat16"
        )
    return vectors


def unit_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float32, copy=False)
