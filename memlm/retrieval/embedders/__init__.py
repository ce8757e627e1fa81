"""Embedders: texts to vectors by hashing alone, by any Hugging Face model, or by a sentence-transformer.

All give float32 vectors of length 1, so that a product of vectors is a cosine; a text without a word or
token gives zeros. A row depends on its own text only, not on what else is or was embedded.
"""

from __future__ import annotations

from memlm.retrieval.embedders.hashing import HashingEmbedder
from memlm.retrieval.embedders.model import ModelEmbedder
from memlm.retrieval.embedders.sentence_transformer import SentenceTransformerEmbedder

__all__ = ["HashingEmbedder", "ModelEmbedder", "SentenceTransformerEmbedder"]
