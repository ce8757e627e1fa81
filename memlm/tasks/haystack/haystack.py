"""A haystack: documents of one source, as sentences or as tokens."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from memlm.tasks.haystack.documents import Document, Split
from memlm.tasks.haystack.sources import MAX_CHARACTERS, read_documents
from memlm.tasks.haystack.tokenised import MIN_TOKENS, TokenHaystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Haystack:
    """Documents of one split of a source."""

    def __init__(self, source: str, documents: Sequence[Document]) -> None:
        kept = [document for document in documents if document.sentences]
        if not kept:
            raise ValueError(
                f"haystack {source!r} holds no sentence; give a source with prose in it"
            )
        self.source = source
        self.documents = kept
        self._tokenized: TokenHaystack | None = None

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str] = "builtin",
        split: Split = "eval",
        max_characters: int = MAX_CHARACTERS,
    ) -> Haystack:
        """Read the documents of `source` that belong to `split`, about one in ten to eval."""
        documents = list(read_documents(source, split, max_characters))
        return cls(os.fspath(source), documents)

    def sentences(self, rng: np.random.Generator) -> Iterator[str]:
        """Yield sentences forever: of a random document, from a random one to its end, then of another."""
        while True:
            sentences = self.documents[int(rng.integers(len(self.documents)))].sentences
            yield from itertools.islice(sentences, int(rng.integers(len(sentences))), None)

    def tokenized(
        self, tokenizer: PreTrainedTokenizerBase, min_tokens: int = MIN_TOKENS
    ) -> TokenHaystack:
        """Tokenise every sentence once; the last result is kept for the next call."""
        known = self._tokenized
        if known is None or known.tokenizer is not tokenizer or known.min_tokens != min_tokens:
            known = TokenHaystack(self.documents, tokenizer, self.source, min_tokens)
            self._tokenized = known
        return known
