"""Retrieval: chunks of text, embedders, and an index that finds chunks by meaning and by word.

Names are imported on first use, so that importing this package loads neither faiss nor torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlm.retrieval.base import Embedder
    from memlm.retrieval.chunks import Chunk, chunk_text
    from memlm.retrieval.embedders import (
        HashingEmbedder,
        ModelEmbedder,
        SentenceTransformerEmbedder,
    )
    from memlm.retrieval.index import ChunkIndex, Hit
    from memlm.retrieval.milvus import MilvusStore
    from memlm.retrieval.retriever import RetrievalConfig, Retriever

_NAMES = {
    "Chunk": "memlm.retrieval.chunks",
    "ChunkIndex": "memlm.retrieval.index",
    "Embedder": "memlm.retrieval.base",
    "HashingEmbedder": "memlm.retrieval.embedders",
    "Hit": "memlm.retrieval.index",
    "MilvusStore": "memlm.retrieval.milvus",
    "ModelEmbedder": "memlm.retrieval.embedders",
    "RetrievalConfig": "memlm.retrieval.retriever",
    "Retriever": "memlm.retrieval.retriever",
    "SentenceTransformerEmbedder": "memlm.retrieval.embedders",
    "chunk_text": "memlm.retrieval.chunks",
}

__all__ = [
    "Chunk",
    "ChunkIndex",
    "Embedder",
    "HashingEmbedder",
    "Hit",
    "MilvusStore",
    "ModelEmbedder",
    "RetrievalConfig",
    "Retriever",
    "SentenceTransformerEmbedder",
    "chunk_text",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'memlm.retrieval' has no attribute {name!r}")
