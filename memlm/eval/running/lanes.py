"""Which texts are read side by side: as many as there are rows, joining and leaving at segment borders.

Texts of any lengths share a batch without padding: as soon as one has been read to its last whole segment,
the next one takes its row. What is asked about texts that were read waits until a batch of questions has
come together. No model and no torch: this runs in the thread that prepares what the model reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.padding import pad_rows

if TYPE_CHECKING:
    from memlm.eval.running.readers import Asked

Tokens = NDArray[np.int64]


class TextName(NamedTuple):
    """What tells a text from the others of a run: of which cell it is, and which document of it."""

    task: str
    length: str
    document: str


@dataclass
class Tape:
    """A sample's tokens, taken in order, any number at a time."""

    pieces: Iterator[NDArray[np.int32]]
    rest: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def take(self, into: Tokens) -> None:
        """Fill `into` with the next tokens, which must be there."""
        filled = 0
        while filled < len(into):
            if not len(self.rest):
                self.rest = next(self.pieces)
            piece = self.rest[: len(into) - filled]
            into[filled : filled + len(piece)] = piece
            filled += len(piece)
            self.rest = self.rest[len(piece) :]

    def skip(self, count: int) -> None:
        while count > 0:
            if not len(self.rest):
                self.rest = next(self.pieces)
            passed = min(count, len(self.rest))
            self.rest = self.rest[passed:]
            count -= passed


@dataclass
class Text:
    """A text on its way into the memory, and what is asked afterwards: `questions` of the samples `asked`.

    tape: its tokens from the first that is not `done`. whole, tokens: how many there are in whole segments,
    and in all.
    """

    name: TextName
    asked: list[Asked]
    questions: list[NDArray[np.int32]]
    tape: Tape
    done: int
    whole: int
    tokens: int
    rest: Tokens | None = None

    def close(self) -> None:
        """Take what is left after the whole segments; its document is not held any longer."""
        self.rest = np.empty(self.tokens - self.done, dtype=np.int64)
        self.tape.take(self.rest)
        self.tape = Tape(iter(()))


@dataclass(frozen=True)
class Stretch:
    """Whole segments of several texts side by side: ids (B, n * segment_length), all of them real."""

    texts: list[TextName]
    ids: Tokens

    @property
    def size(self) -> int:
        return self.ids.size


@dataclass(frozen=True)
class Questions:
    """Questions about texts of which all whole segments were read.

    texts: that of each question. ids, mask (B, T): the prompts, padded on the left. short: the texts with a
    last, short segment that is read into memory before (short_ids, short_mask, padded on the right).
    leaving: texts about which nothing is asked any more.
    """

    asked: list[Asked]
    texts: list[TextName]
    ids: Tokens
    mask: NDArray[np.bool_]
    leaving: list[TextName]
    short: list[TextName]
    short_ids: Tokens | None = None
    short_mask: NDArray[np.bool_] | None = None

    @property
    def size(self) -> int:
        return self.ids.size


def side_by_side(
    texts: Iterable[Text], rows: int, segment: int, at_once: int, own_segment: bool, pad: int
) -> Iterator[Stretch | Questions]:
    """Lay out what is read and asked. `texts` are opened one by one, each when a row is free for it.

    rows: texts that are read at once, and questions asked at once. at_once: the most segments of a text in
    one stretch. own_segment: whether the tokens after the last whole segment are read into memory;
    otherwise they stand before the question.
    """
    coming = iter(texts)
    ended = False
    reading: list[Text] = []
    waiting: list[tuple[Text, int]] = []

    def put(text: Text) -> None:
        if text.done < text.whole:
            reading.append(text)
        else:
            text.close()
            waiting.extend((text, number) for number in range(len(text.asked)))

    while reading or waiting or not ended:
        if len(reading) < rows and not ended:
            text = next(coming, None)
            if text is None:
                ended = True
            else:
                put(text)
        elif reading:
            count = min(at_once * segment, *(text.whole - text.done for text in reading))
            ids = np.empty((len(reading), count), dtype=np.int64)
            for text, row in zip(reading, ids, strict=True):
                text.tape.take(row)
                text.done += count
            yield Stretch([text.name for text in reading], ids)
            before, reading = reading, []
            for text in before:
                put(text)
        while len(waiting) >= rows or (waiting and ended and not reading):
            yield _questions(waiting[:rows], own_segment, pad)
            waiting = waiting[rows:]


def _questions(chosen: list[tuple[Text, int]], own_segment: bool, pad: int) -> Questions:
    short: dict[TextName, Tokens] = {}
    prompts = []
    for text, number in chosen:
        assert text.rest is not None
        if own_segment and len(text.rest):
            short[text.name] = text.rest
            text.rest = text.rest[:0]
        prompts.append(np.concatenate([text.rest, text.questions[number]]))
    ids, mask = pad_rows(prompts, pad, left=True)
    return Questions(
        [text.asked[number] for text, number in chosen],
        [text.name for text, _ in chosen],
        ids,
        mask,
        [text.name for text, number in chosen if number == len(text.asked) - 1],
        list(short),
        *(pad_rows(list(short.values()), pad) if short else ()),
    )
