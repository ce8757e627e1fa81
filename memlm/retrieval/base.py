"""What an index asks of an embedder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Embedder(Protocol):
    """Texts to vectors.

    dim: width of a vector. fingerprint: changes whenever the same text could give another vector, so
    that an index never mixes vectors of two kinds.
    """

    dim: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row a document, in order."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row a query, in order."""
        ...
