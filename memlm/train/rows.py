"""Rows of people's own data as training documents: questions on documents, chats, completions, texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from memlm.data.encoding import Encoder
from memlm.data.opening import Rows
from memlm.data.order import ShuffledRows
from memlm.data.rows import DocumentRow, Row, TextRow
from memlm.data.tables import StreamedRows
from memlm.scan import Anchor, first_window
from memlm.segment import IGNORE
from memlm.train.curriculum import Stage
from memlm.train.data import Piece, Question, shifted
from memlm.train.documents import cut_pieces

# Characters of text that are tokenised to learn how many tokens a text has; the rest is estimated.
COUNTED_CHARACTERS = 2_000_000
# Rows of a stream of unknown length that are looked at before training starts.
LOOKED_AT = 100


@dataclass(frozen=True)
class Survey:
    """What the rows hold. lengths: tokens of each row. whole: whether these are all rows there are.

    exact: whether all tokens were counted, rather than estimated from characters. single: whether every
    row is one piece. aimed: of each row, the segments of `segment_length` tokens in which something is
    learned; None: all of them.
    """

    lengths: np.ndarray
    questions: int
    whole: bool
    exact: bool
    single: bool
    segment_length: int
    aimed: tuple[np.ndarray | None, ...]

    def pieces(self, stage: Stage, window: int | None = None, anchor: Anchor = "end") -> int:
        """About how many pieces the rows make in `stage`, or windows of so many segments.

        Pieces and windows in which nothing is learned join the next one.
        """
        if window is None and self.single:
            return len(self.lengths)
        size = (stage.min_segments + stage.max_segments) / 2
        total = 0
        for length, aimed in zip(self.lengths, self.aimed, strict=True):
            if aimed is None:
                aimed = np.arange(max(1, -(-int(length) // self.segment_length)))
            numbers: np.ndarray
            if not self.single:
                numbers = aimed // (size if window is None else min(size, window))
            else:
                assert window is not None
                first = first_window(int(aimed.max(initial=0)) + 1, window, anchor)
                numbers = (aimed - first) // window
            total += max(1, len(np.unique(numbers)))
        return total


class RowSource:
    """Rows as training documents, in an order shuffled anew every epoch.

    A document with questions is one piece, however long, and gradients reach from a question as far back as
    `bptt_depth` says. Anything else is cut into pieces of as many segments as the stage draws, and read
    on from batch to batch; a piece goes on until it has something to learn.
    """

    def __init__(self, rows: Rows, encoder: Encoder, segment_length: int, seed: int = 0) -> None:
        self.rows = rows
        self.encoder = encoder
        self.segment_length = segment_length
        self.seed = seed
        self.asks = rows.format.asks
        self._shuffled = ShuffledRows(rows, seed)

    def single_piece(self, stages: Sequence[Stage]) -> bool:
        """Whether every document is one piece: those with questions are."""
        return self.asks

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        """The pieces of row `ordinal`, counted through all epochs."""
        row = self._shuffled[ordinal]
        if isinstance(row, DocumentRow):
            yield self._asked(row)
            return
        ids, labels = self.encoder.encode(row)
        rng = np.random.default_rng([self.seed, ordinal])
        yield from cut_pieces(ids, shifted(labels), self.segment_length, stage, rng)

    def whole(self, limit: int) -> list[Piece]:
        """The first `limit` rows in their order, each in one piece, to evaluate on."""
        return [self._whole(row) for row in islice(self.rows, limit)]

    def _whole(self, row: Row) -> Piece:
        if isinstance(row, DocumentRow):
            return self._asked(row)
        ids, labels = self.encoder.encode(row)
        return Piece(ids, shifted(labels))

    def survey(self) -> Survey:
        """Go through the rows once, and refuse those that cannot be learned from.

        Of a stream of unknown length, only the first rows. ValueError names row, key and remedy.
        """
        whole = not isinstance(self.rows, StreamedRows) or self.rows.size is not None
        lengths, questions, counted, characters = [], 0, 0, 0
        aimed: list[np.ndarray | None] = []
        exact = True
        for row in self.rows if whole else islice(self.rows, LOOKED_AT):
            if isinstance(row, DocumentRow):
                questions += self._check_questions(row)
            places: np.ndarray | None = None
            if isinstance(row, (DocumentRow, TextRow)):
                size = len(row.text)
                if characters < COUNTED_CHARACTERS:
                    tokens, places = self._count(row)
                    counted, characters = counted + tokens, characters + size
                else:
                    tokens, exact = round(size * counted / characters), False
            else:
                tokens, places = self._count(row)
            lengths.append(tokens)
            aimed.append(places)
        return Survey(
            np.array(lengths), questions, whole, exact, self.asks, self.segment_length, tuple(aimed)
        )

    def _count(self, row: Row) -> tuple[int, np.ndarray | None]:
        """A row's tokens, and the segments in which something is learned; None: all."""
        if isinstance(row, DocumentRow):
            piece = self._piece(row)
            return len(piece.ids), np.unique([question.segment for question in piece.questions])
        ids, labels = self.encoder.encode(row)
        if isinstance(row, TextRow):
            return len(ids), None
        targets = np.flatnonzero(shifted(labels) != IGNORE)
        return len(ids), np.unique(targets // self.segment_length)

    def _check_questions(self, row: DocumentRow) -> int:
        found = self.encoder.encode_questions(row)
        for (_, question), (prompt, answer) in zip(row.asked, found, strict=True):
            width = len(prompt) + len(answer)
            if width > self.segment_length:
                raise ValueError(
                    f"{row.where}: the question {question.question[:40]!r} with its answer has {width} "
                    f"tokens, more than a segment of {self.segment_length}; shorten it, or give a "
                    "new memory a larger model.segment_length"
                )
        return len(found)

    def _asked(self, row: DocumentRow) -> Piece:
        self._check_questions(row)
        return self._piece(row)

    def _piece(self, row: DocumentRow) -> Piece:
        ids, asked = self.encoder.encode_document(row)
        questions = tuple(
            Question(
                max(question.read - 1, 0) // self.segment_length,
                np.concatenate([question.prompt, question.answer]),
                len(question.answer),
            )
            for question in asked
        )
        return Piece(ids, None, questions)
