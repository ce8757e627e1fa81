"""Documents of noise, and which of them are trained on.

Documents are divided into a train and an eval split by their names, so that noise trained on is never
evaluated on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "eval", "all"]

BLOCK_CHARACTERS = 20_000

# A built-in document gathers neighbours up to this size: noise should run on like a book.
BUILTIN_WORDS = 1_500


@dataclass(frozen=True)
class Document:
    """A named stretch of text, cut into sentences in reading order."""

    name: str
    sentences: list[str]


def of_split(documents: Iterable[Document], split: Split) -> Iterator[Document]:
    if split == "all":
        yield from documents
        return
    held_out = split == "eval"
    # The draw is kept once it has put a document into each split; until then documents are held back.
    waiting: list[Document] = []
    sides: set[bool] = set()
    for document in documents:
        side = _draw_of(document) % 10 == 0
        if len(sides) == 2:
            if side == held_out:
                yield document
            continue
        waiting.append(document)
        sides.add(side)
        if len(sides) == 2:
            yield from (d for d in waiting if (_draw_of(d) % 10 == 0) == held_out)
            waiting = []
    if len(waiting) > 1:
        # Too few documents for the draw to be fair: hold out exactly one.
        least = min(waiting, key=_draw_of)
        yield from (d for d in waiting if (d.name == least.name) == held_out)


def _draw_of(document: Document) -> int:
    """A pseudo-random number that depends on the document's name alone."""
    digest = hashlib.blake2b(document.name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def gather(documents: Iterable[Document], words: int) -> Iterator[Document]:
    """Join neighbours into documents of at least `words` words."""
    pending: list[str] = []
    name, held = "", 0
    for document in documents:
        name = name or document.name
        pending = pending + document.sentences
        held += sum(sentence.count(" ") + 1 for sentence in document.sentences)
        if held >= words:
            yield Document(name, pending)
            pending, name, held = [], "", 0
    if pending:
        yield Document(name, pending)
