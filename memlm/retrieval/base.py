"""What an index needs of an embedder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Encode = Callable[[Sequence[str]], NDArray[np.float32]]


class Embedder(Protocol):
    """Turns texts into vectors; the methods are named as in sentence-transformers.

    dim: width of a vector. fingerprint: changes whenever the same text could give another vector, so
    that an index never mixes vectors of two kinds.

    An embedder with the former names, `encode` and `encode_queries`, works as well.
    """

    dim: int
    fingerprint: str

    def encode_document(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row per document, in order."""
        ...

    def encode_query(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row per query, in order."""
        ...


def document_encoder(embedder: Embedder) -> Encode:
    """The embedder's method for documents: `encode_document`, or the older `encode`."""
    return _first_method(embedder, "encode_document", "encode")


def query_encoder(embedder: Embedder) -> Encode:
    """The embedder's method for queries: `encode_query`, or the older `encode_queries`."""
    return _first_method(embedder, "encode_query", "encode_queries")


def _first_method(embedder: Embedder, name: str, older: str) -> Encode:
    method = getattr(embedder, name, None) or getattr(embedder, older, None)
    if method is None:
        raise ValueError(
            f"embedder is a {type(embedder).__name__}, which has no {name}; give it one, from a list of "
            "texts to float32 vectors (n, dim)"
        )
    return method
