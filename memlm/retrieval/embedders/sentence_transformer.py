"""SentenceTransformerEmbedder: a model of the sentence-transformers library."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.retrieval.embedders.checks import checked_texts, checked_vectors, unit_rows
from memlm.retrieval.embedders.fingerprints import VERSION, digest, parameter_digest


class SentenceTransformerEmbedder:
    """A sentence-transformers model, by hub id or folder, or a live one.

    Queries and documents go through the model's own `encode_query` and `encode_document`, which know its
    prompts and which of its modules are for which; `query_prompt` and `document_prompt`, where they are
    given, stand in for the model's prompts. A model without these methods (sentence-transformers before
    5.0) is asked with the prompt of the same names. Needs the extra:
    pip install "memlm[sentence-transformers]".
    """

    def __init__(
        self,
        model: Any,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if isinstance(model, (str, os.PathLike)):
            model = _load_sentence_transformer(os.fspath(model), device)
        elif device is not None:
            raise ValueError(
                f"device={device!r} is for a model given by name; move a live one yourself"
            )
        if not hasattr(model, "encode") or not hasattr(model, "named_parameters"):
            raise ValueError(
                f"model is a {type(model).__name__}; give a SentenceTransformer, or its hub id or folder"
            )
        self.model = model
        self.query_prompt = query_prompt
        self.document_prompt = document_prompt
        self.batch_size = batch_size
        self.dim = int(np.asarray(model.encode(["a"])).shape[1])
        described: dict[str, Any] = {
            # Its modules with their settings: pooling has no parameters.
            "modules": repr(model),
            "parameters": parameter_digest(model),
            "prompts": [query_prompt, document_prompt, getattr(model, "prompts", None)],
            "max_length": getattr(model, "max_seq_length", None),
        }
        if (query_prompt, document_prompt) != (None, None) and hasattr(model, "encode_query"):
            # Differs from a plain `encode` with this prompt: a Router picks modules by the method.
            described["routed"] = True
        text = json.dumps(described, sort_keys=True, default=str)
        self.fingerprint = f"sentence-transformers-{VERSION}:dim={self.dim}:{digest(text.encode())}"

    def encode_document(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row per document."""
        # The names in the order in which the library's own method looks for them.
        names = ("document", "passage", "corpus")
        return self._encode_with("encode_document", texts, self.document_prompt, names)

    def encode_query(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row per query."""
        return self._encode_with("encode_query", texts, self.query_prompt, ("query",))

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same as `encode_document`."""
        return self.encode_document(texts)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The older name of `encode_query`."""
        return self.encode_query(texts)

    def _encode_with(
        self, method: str, texts: Sequence[str], prompt: str | None, names: tuple[str, ...]
    ) -> NDArray[np.float32]:
        """Unit vectors by the model's `method`, or by `encode` with the first prompt of `names` it has."""
        texts = checked_texts(texts)
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        settings: dict[str, Any] = {}
        encode = getattr(self.model, method, None)
        if prompt is not None:
            settings["prompt"] = prompt
        elif encode is None:
            known = getattr(self.model, "prompts", None) or {}
            settings["prompt"] = next((known[name] for name in names if known.get(name)), None)
        encode = encode or self.model.encode
        found = encode(
            texts,
            batch_size=self.batch_size,
            convert_to_numpy=True,
            show_progress_bar=False,
            **settings,
        )
        vectors = checked_vectors(
            np.asarray(found, dtype=np.float32), len(texts), self.dim, "SentenceTransformerEmbedder"
        )
        return unit_rows(vectors)


def _load_sentence_transformer(name: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "SentenceTransformerEmbedder needs sentence-transformers: "
            'pip install "memlm[sentence-transformers]"'
        ) from error
    return SentenceTransformer(name, device=device)
