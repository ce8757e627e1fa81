"""What an index needs of an embedder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from memlm.retrieval.codes import PRECISIONS, Precision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Encode = Callable[[Sequence[str]], NDArray[np.float32]]


class Embedder(Protocol):
    """Turns texts into vectors; the methods are named as in sentence-transformers.

    dim: width of a vector. fingerprint: changes whenever the same text could give another vector, so
    that an index never mixes vectors of two kinds. An embedder may also have a `precision`: how an index
    keeps its vectors unless told otherwise ("float32" where it has none).

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


def check_precision(embedder: Embedder, factory: str, precision: str | None) -> Precision | None:
    """The precision of a "Flat" index, the embedder's own for None; None for factories, which have codes.

    ValueError when it is unknown, or given for another factory.
    """
    if factory != "Flat":
        if precision is not None:
            raise ValueError(
                f"precision={precision!r} is for factory='Flat', and factory={factory!r} says itself how "
                "vectors are kept; leave one of the two out"
            )
        return None
    chosen = getattr(embedder, "precision", "float32") if precision is None else precision
    if chosen not in PRECISIONS:
        raise ValueError(f"precision={chosen!r} is unknown; use one of {', '.join(PRECISIONS)}")
    return chosen


def _first_method(embedder: Embedder, name: str, older: str) -> Encode:
    method = getattr(embedder, name, None) or getattr(embedder, older, None)
    if method is None:
        raise ValueError(
            f"embedder is a {type(embedder).__name__}, which has no {name}; give it one, from a list of "
            "texts to float32 vectors (n, dim)"
        )
    return method
