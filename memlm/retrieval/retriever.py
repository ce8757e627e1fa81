"""Retriever: cuts what a stream reads into chunks, indexes them as it goes, and recalls them for questions.

Everything a retriever writes is marked as its own, and it finds nothing that another one wrote into the
same index. It sees its own chunks and those that no retriever wrote: a library that was indexed before.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from memlm.retrieval.arguments import ABSENT, check_where
from memlm.retrieval.base import Embedder
from memlm.retrieval.chunks import Chunk, Chunker
from memlm.retrieval.index import ChunkIndex, Hit
from memlm.templates import DOCUMENT_RECALL_TEMPLATE
from memlm.text import split_sentences
from memlm.tokens import Part, fill, joined

# Chunks embedded at once: one at a time would cost several times as much.
BATCH = 256
# How many sentences a further hop searches for, and their least similarity, as a share of the best one's.
CLUES = 4
CLUE_SHARE = 0.5
_OWNER = "memlm_stream"


@dataclass(frozen=True)
class Recalled:
    """A passage that was recalled: its text, its document, and where it stands there.

    start, end: characters of the document; None where the index does not say. score: the index's.
    """

    text: str
    document: str | None
    start: int | None
    end: int | None
    id: str | int
    score: float


@dataclass(frozen=True)
class RetrievalConfig:
    """How text is cut into chunks, and how many are recalled.

    k: chunks a question recalls. size, overlap: words of a chunk, and how many of them are repeated in
    the next one; by: "sentences" or "tokens", as in `chunk_text`. hops: how often the index is searched
    for a question. Every search after the first is for those sentences found before that are most similar
    to the question, so that one fact may lead to another. where: a filter on the metadata of what may be
    recalled.
    """

    k: int = 4
    size: int = 64
    overlap: int = 0
    by: str = "sentences"
    hops: int = 1
    where: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("size", 1), ("overlap", 0), ("hops", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        if self.where is not None:
            # In a form that JSON can hold: a stream saves its settings.
            object.__setattr__(self, "where", check_where(self.where))


class Retriever:
    """Writes text into `index`, and recalls the chunks of it that help to answer a question.

    A retriever is for one stream. `fork` gives a second one that knows what this one has written so far;
    afterwards neither sees what the other writes. So it is with all that go on from one saved state, where
    the index is a store that they share.
    """

    def __init__(self, index: ChunkIndex, config: RetrievalConfig | None = None) -> None:
        self.index = index
        self.config = config or RetrievalConfig()
        self.document: str | None = None
        self._owners = [_new_owner()]
        self._written = 0
        # Chunks before this number are somebody else's as well: a fork's, or a saved stream's.
        self._shared = 0
        self._chunker = self._new_chunker()
        self._queued: list[tuple[str, str, dict[str, Any]]] = []

    def write(self, text: str, document: str | None = None) -> None:
        """Add text of the document of that name; a new name ends the document before."""
        if document is not None and document != self.document:
            self.end()
            self.document = document
        self._queue(self._chunker.push(text))

    def end(self) -> None:
        """End the document: the rest that is not a whole chunk yet becomes one."""
        self._queue(self._chunker.finish())
        self._chunker = self._new_chunker()

    def recall(self, question: str, k: int | None = None) -> list[Recalled]:
        """The chunks that answer `question` best, in the order in which they were written.

        The newest text is not among them until it is a whole chunk.
        """
        self.flush()
        wanted = self.config.k if k is None else k
        where = {**(self.config.where or {}), _OWNER: [ABSENT, *self._owners]}
        found: dict[str | int, Hit] = {}
        queries = [question]
        for hop in range(self.config.hops):
            # Every hop adds its share of the k chunks, the last one the rest.
            share = -(-wanted * (hop + 1) // self.config.hops)
            # The best hits of all queries first, then the second best: no query crowds out the others.
            ranks = zip_longest(*self.index.search(queries, k=wanted, where=where))
            for hit in (hit for rank in ranks for hit in rank if hit is not None):
                if len(found) < share:
                    found.setdefault(hit.id, hit)
            if hop + 1 < self.config.hops:
                queries = self._clue_sentences(question, list(found.values())) or queries
        ordered = sorted(found.values(), key=_written_order)
        return [
            Recalled(
                hit.text,
                hit.metadata.get("document"),
                hit.metadata.get("start"),
                hit.metadata.get("end"),
                hit.id,
                float(hit.score),
            )
            for hit in ordered
        ]

    def _clue_sentences(self, question: str, hits: Sequence[Hit]) -> list[str]:
        """The sentences found that are most similar to the question, each to be searched for by itself.

        Whole passages would drown the sentence that leads on in whatever stands around it.
        """
        sentences = list(dict.fromkeys(s for hit in hits for s in split_sentences(hit.text)))
        if not sentences:
            return []
        likeness = self.index.likeness(question, sentences)
        best = sorted(range(len(sentences)), key=lambda n: -likeness[n])[:CLUES]
        return [
            sentences[n] for n in best if likeness[n] > max(0.0, CLUE_SHARE * likeness[best[0]])
        ]

    def flush(self) -> None:
        """Put the waiting chunks into the index."""
        if self._queued:
            ids, texts, metadata = zip(*self._queued, strict=True)
            self.index.add(list(texts), ids=list(ids), metadata=list(metadata))
            self._queued = []

    def withdraw(self) -> None:
        """Take what was written out of the index again: for a stream that ends without being saved.

        What a fork or a saved stream has in common with this one stays.
        """
        waiting, self._queued = [name for name, _, _ in self._queued], []
        mine = [self._chunk_id(n) for n in range(self._shared, self._written - len(waiting))]
        # An `add` that failed may have left some of them.
        mine += [name for name in waiting if name in self.index]
        if mine:
            self.index.remove(mine)
        self._written = self._shared
        self._chunker = self._new_chunker()

    def fork(self) -> Retriever:
        """A retriever that knows what this one knows; neither sees what the other writes from now on."""
        self.flush()
        other = Retriever(self.index, self.config)
        other.document, other._written = self.document, self._written
        other._owners = [*self._owners, _new_owner()]
        other._chunker = Chunker.restore(self._chunker.state())
        self._owners = [*self._owners, _new_owner()]
        self._shared = other._shared = self._written
        return other

    def state(self) -> dict[str, Any]:
        """What is needed to go on, beside the index; fit for JSON."""
        self.flush()
        owners = self._owners
        if self.index.outlives_process:
            # Whoever goes on from here looks into the same store, and must not see what comes next: this
            # retriever's present name is given away only if it takes another.
            if self._written > self._shared or len(owners) == 1:
                self._owners = [*owners, _new_owner()]
            else:
                owners = owners[:-1]
        # Whoever goes on from here needs them.
        self._shared = self._written
        return {
            "document": self.document,
            "owners": list(owners),
            "written": self._written,
            "chunker": self._chunker.state(),
            "config": {**self.config.__dict__},
        }

    @classmethod
    def restore(cls, index: ChunkIndex, state: Mapping[str, Any]) -> Retriever:
        """Go on from `state`, with the index it was saved with. ValueError when it is no state."""
        try:
            retriever = cls(index, RetrievalConfig(**state["config"]))
            document, written, owners = state["document"], state["written"], state["owners"]
            retriever._chunker = Chunker.restore(state["chunker"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"state is no state of a retriever ({error!r})") from error
        if (
            not isinstance(document, str | None)
            or isinstance(written, bool)
            or not isinstance(written, int)
            or written < 0
            or not isinstance(owners, list)
            or not owners
            or not all(isinstance(owner, str) for owner in owners)
        ):
            raise ValueError(
                f"state has document={document!r}, written={written!r} and owners={owners!r}; give what "
                "Retriever.state returned"
            )
        retriever.document, retriever._written, retriever._owners = document, written, owners[:]
        retriever._shared = written
        # An index may have been saved later than the state; the stream has not read these.
        ahead = itertools.takewhile(
            index.__contains__, map(retriever._chunk_id, itertools.count(state["written"]))
        )
        if late := list(ahead):
            index.remove(late)
        if index.outlives_process:
            # Others may go on from the same state, in the same store.
            retriever._owners.append(_new_owner())
        return retriever

    def _chunk_id(self, number: int) -> str:
        return f"{self._owners[-1]}/{number}"

    def _new_chunker(self) -> Chunker:
        config = self.config
        return Chunker(size=config.size, overlap=config.overlap, by=config.by)

    def _queue(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            if not chunk.text.strip():
                continue
            metadata: dict[str, Any] = {
                _OWNER: self._owners[-1],
                "document": self.document,
                "start": chunk.start,
                "end": chunk.end,
                "order": self._written,
            }
            self._queued.append((self._chunk_id(self._written), chunk.text, metadata))
            self._written += 1
        if len(self._queued) >= BATCH:
            self.flush()


def as_retriever(retrieval: ChunkIndex | Retriever | None) -> Retriever | None:
    """The retriever for what a stream was given as `retrieval`."""
    if retrieval is None or isinstance(retrieval, Retriever):
        return retrieval
    if isinstance(retrieval, ChunkIndex):
        return Retriever(retrieval)
    raise TypeError(
        f"retrieval is a {type(retrieval).__name__}; give a ChunkIndex, a Retriever or None"
    )


def render(recalled: Iterable[Recalled], template: str = DOCUMENT_RECALL_TEMPLATE) -> str:
    """The text that shows recalled passages to a model, before the question."""
    return joined(render_parts(recalled, template))


def render_parts(
    recalled: Iterable[Recalled], template: str = DOCUMENT_RECALL_TEMPLATE
) -> list[Part]:
    """`render`, in parts that separate the template from what fills it."""
    return [
        part
        for passage in recalled
        for part in fill(
            template,
            document=passage.document or "",
            start="" if passage.start is None else str(passage.start),
            text=" ".join(passage.text.split()),
        )
    ]


def read_document(
    pieces: Iterable[str], embedder: Embedder, config: RetrievalConfig | None = None
) -> Retriever:
    """A retriever for one document, with a new index."""
    retriever = Retriever(ChunkIndex(embedder), config)
    for piece in pieces:
        retriever.write(piece)
    retriever.end()
    return retriever


def _new_owner() -> str:
    return uuid.uuid4().hex[:16]


def _written_order(hit: Hit) -> tuple[int, float]:
    """A sort key: passages in the order in which they were written, those of a library first."""
    order = hit.metadata.get("order")
    # A library's chunks have no order here: the best come last, next to the question.
    return (1, float(order)) if order is not None else (0, float(hit.score))
