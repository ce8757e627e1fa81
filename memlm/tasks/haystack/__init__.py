"""Noise text: sources of documents, their sentences, and a tokenised form that is cheap to cut."""

from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.tasks.haystack.documents import Document, Split
from memlm.tasks.haystack.haystack import Haystack
from memlm.tasks.haystack.sources import check_source, read_documents
from memlm.tasks.haystack.tokenised import SentenceTexts, TokenHaystack, from_sentences, tokenise

__all__ = [
    "Document",
    "Haystack",
    "SentenceTexts",
    "Split",
    "TokenHaystack",
    "check_source",
    "from_sentences",
    "read_documents",
    "tokenise",
    "tokenized_haystack",
]
