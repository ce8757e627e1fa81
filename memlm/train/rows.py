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
    row is one piece.
    """

    lengths: np.ndarray
    questions: int
    whole: bool
    exact: bool
    single: bool

    def pieces(self, stage: Stage, segment_length: int) -> int:
        """About how many pieces the rows make in `stage`."""
        if self.single:
            return len(self.lengths)
        tokens = (stage.min_segments + stage.max_segments) / 2 * segment_length
        return int(np.ceil(self.lengths / tokens).sum())


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
        self.asks = rows.format.name in ("document", "documents")
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

    def survey(self) -> Survey:
        """Go through the rows once, and refuse those that cannot be learned from.

        Of a stream of unknown length, only the first rows. ValueError names row, key and remedy.
        """
        whole = not isinstance(self.rows, StreamedRows) or self.rows.size is not None
        lengths, questions, counted, characters = [], 0, 0, 0
        exact = True
        for row in self.rows if whole else islice(self.rows, LOOKED_AT):
            if isinstance(row, DocumentRow):
                questions += self._check_questions(row)
            if isinstance(row, (DocumentRow, TextRow)):
                size = len(row.text)
                if characters < COUNTED_CHARACTERS:
                    tokens = self._count(row)
                    counted, characters = counted + tokens, characters + size
                else:
                    tokens, exact = round(size * counted / characters), False
            else:
                tokens = self._count(row)
            lengths.append(tokens)
        return Survey(np.array(lengths), questions, whole, exact, self.asks)

    def _count(self, row: Row) -> int:
        if isinstance(row, DocumentRow):
            return len(self.encoder.encode_document(row)[0])
        return len(self.encoder.encode(row)[0])

    def _check_questions(self, row: DocumentRow) -> int:
        found = self.encoder.encode_questions(row)
        for (_, question), (prompt, answer) in zip(row.asked, found, strict=True):
            width = len(prompt) + len(answer)
            if width > self.segment_length:
                raise ValueError(
                    f"{row.where}: the question {question.question[:40]!r} with its answer has {width} "
                    f"tokens, more than a segment of {self.segment_length}; shorten it, or use a larger "
                    "model.segment_length"
                )
        return len(found)

    def _asked(self, row: DocumentRow) -> Piece:
        self._check_questions(row)
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
