"""Chunks: text of any length cut into passages an embedder can take, each knowing where it stands.

Chunks depend on the text alone, never on how it was handed over: pieces of any size, even single
characters, give the chunks of the whole. About two chunks of text are held at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memlm.text import LIST_ITEM, ends_sentence

VERSION = 1
# A run of characters without a blank counts as one word up to this length; a longer one is cut into parts.
LONGEST_WORD = 256
# Characters of such a part; none of the words of a running text is longer.
WORD_PART = 32
# White space longer than this ends a chunk, so that no chunk carries it along.
LONGEST_GAP = 256
# Characters of a long string that are cut together.
SLICE = 1 << 16
_MAX_COUNTS = 1 << 16

_RUN = re.compile(r"\S+")

# Where a word or a sentence starts and ends in the document, and how many units it counts as.
_Span = tuple[int, int, int]


@dataclass(frozen=True)
class Chunk:
    """A passage: text == document[start:end], without white space around it."""

    text: str
    start: int
    end: int


def chunk_text(
    text: str | Iterable[str],
    size: int = 64,
    overlap: int = 0,
    unit: str = "words",
    by: str = "sentences",
    tokenizer: Any = None,
) -> Iterator[Chunk]:
    """Cut a string, or pieces of one, into chunks, lazily; the arguments are those of `Chunker`."""
    chunker = Chunker(size, overlap, unit, by, tokenizer)
    return _chunks(chunker, text)


def _chunks(chunker: Chunker, text: str | Iterable[str]) -> Iterator[Chunk]:
    for piece in _slices(text) if isinstance(text, str) else text:
        yield from chunker.push(piece)
    yield from chunker.finish()


def _slices(text: str) -> Iterator[str]:
    return (text[at : at + SLICE] for at in range(0, len(text), SLICE))


class Chunker:
    """Cuts a text that comes in pieces into chunks of at most `size` words or tokens.

    by: "sentences" packs whole sentences, and splits one at blanks only when it alone is longer than
    `size`; "tokens" fills every chunk up, wherever sentences end. overlap: how much of a chunk's end the
    next one repeats at most, in whole sentences or whole words. unit: what `size` and `overlap` count,
    "words" or "tokens" of `tokenizer`, counted word by word with the white space before each.

    A run of characters without a blank counts as one word per 32 characters, and is split only when it is
    longer than 256 characters or alone exceeds `size`. White space of over 256 characters ends a chunk.
    """

    def __init__(
        self,
        size: int = 64,
        overlap: int = 0,
        unit: str = "words",
        by: str = "sentences",
        tokenizer: Any = None,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r} must be a whole number of at least 1")
        if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap < size:
            raise ValueError(
                f"overlap={overlap!r} must be a whole number from 0 to below size={size}"
            )
        if unit not in ("words", "tokens"):
            raise ValueError(f"unit={unit!r} is not known; use 'words' or 'tokens'")
        if by not in ("sentences", "tokens"):
            raise ValueError(f"by={by!r} is not known; use 'sentences' or 'tokens'")
        if unit == "tokens" and tokenizer is None:
            raise ValueError("unit='tokens' needs a tokenizer to count with; give tokenizer=...")
        if unit == "words" and tokenizer is not None:
            raise ValueError("unit='words' counts no tokens; use unit='tokens', or tokenizer=None")
        self.size = size
        self.overlap = overlap
        self.unit = unit
        self.by = by
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}
        # The text from `_base` on; up to `_at` it is words already, the rest is still to be looked at.
        self._text = ""
        self._base = 0
        self._at = 0
        # `_at` is inside a run that is too long for a word.
        self._inside = False
        # The last word, None at the start and after a chunk's end; and whether it is a list item's mark.
        self._previous: str | None = None
        self._marks_item = False
        # Whole sentences of the next chunk, the first of them repeated from the last chunk; and the
        # words of the sentence that has not ended yet.
        self._sentences: list[_Span] = []
        self._repeated = 0
        self._words: list[_Span] = []
        self._total = 0
        self._ended = False

    def push(self, text: str) -> list[Chunk]:
        """Add the next characters of the text; return the chunks that are complete by now."""
        if not isinstance(text, str):
            raise TypeError(f"text holds a {type(text).__name__}; give strings")
        if self._ended:
            raise ValueError("text follows the end of the document; begin another Chunker for it")
        self._text += text
        return self._read_words(final=False)

    def finish(self) -> list[Chunk]:
        """End the text; return the remaining chunks, and none when called again."""
        found = self._read_words(final=True)
        self._end_chunk(found)
        self._text, self._ended = "", True
        return found

    def state(self) -> dict[str, Any]:
        """All that is needed to go on: a few kilobytes, fit for JSON. A tokenizer is not in it."""
        return {
            "version": VERSION,
            "size": self.size,
            "overlap": self.overlap,
            "unit": self.unit,
            "by": self.by,
            "text": self._text,
            "base": self._base,
            "at": self._at,
            "inside": self._inside,
            "previous": self._previous,
            "marks_item": self._marks_item,
            "sentences": [list(span) for span in self._sentences],
            "repeated": self._repeated,
            "words": [list(span) for span in self._words],
            "ended": self._ended,
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any], tokenizer: Any = None) -> Chunker:
        """Go on from `state()`, with the tokenizer it was made with. ValueError when it is not a state."""
        if state.get("version") != VERSION:
            raise ValueError(
                f"state has version {state.get('version')!r}, this memlm reads {VERSION}; give what "
                "Chunker.state returned"
            )
        try:
            chunker = cls(state["size"], state["overlap"], state["unit"], state["by"], tokenizer)
            chunker._text, chunker._base = str(state["text"]), int(state["base"])
            chunker._at, chunker._inside = int(state["at"]), bool(state["inside"])
            chunker._previous = state["previous"]
            chunker._marks_item = bool(state["marks_item"])
            chunker._sentences = [(s, e, n) for s, e, n in state["sentences"]]
            chunker._repeated = int(state["repeated"])
            chunker._words = [(s, e, n) for s, e, n in state["words"]]
            chunker._ended = bool(state["ended"])
            for _, _, count in (*chunker._sentences, *chunker._words):
                if not isinstance(count, int):
                    raise TypeError(f"{count!r} is no count")
        except KeyError as error:
            raise ValueError(f"state lacks {error}; give what Chunker.state returned") from error
        except TypeError as error:
            raise ValueError(
                f"state is damaged ({error}); give what Chunker.state returned"
            ) from error
        chunker._total = _total_count(chunker._sentences) + _total_count(chunker._words)
        return chunker

    def _read_words(self, final: bool) -> list[Chunk]:
        """Take every complete word out of the text."""
        found: list[Chunk] = []
        text, at = self._text, self._at - self._base
        pending = False
        for run in _RUN.finditer(text, at):
            start, end = run.span()
            whole = final or end < len(text)
            if self._inside and start > at:
                self._inside = False
            if not self._inside and end - start <= LONGEST_WORD:
                if not whole:
                    pending = True
                    break
                self._read_word(text, at, start, end, found)
                at = end
                continue
            self._inside = True
            while end - start >= WORD_PART:
                self._read_word(text, at, start, start + WORD_PART, found)
                at = start = start + WORD_PART
            if whole and start < end:
                self._read_word(text, at, start, end, found)
                at = end
            pending = not whole
            self._inside = pending
        if not pending and len(text) - at > LONGEST_GAP:
            # Nothing that follows can make this gap shorter.
            self._end_chunk(found)
            at = len(text)
        self._at = self._base + at
        self._drop_finished_text()
        return found

    def _read_word(self, text: str, gap: int, start: int, end: int, found: list[Chunk]) -> None:
        """Read the word text[start:end], which follows the white space text[gap:start]."""
        if start - gap > LONGEST_GAP:
            self._end_chunk(found)
        word, blank = text[start:end], text[gap:start]
        starts_line = self._previous is None or "\n" in blank
        marks_item = starts_line and LIST_ITEM.fullmatch(word) is not None
        if self._previous is not None and (
            self.by == "tokens"
            or blank.count("\n") > 1
            or marks_item
            or (blank and not self._marks_item and ends_sentence(self._previous, word))
        ):
            self._end_sentence()
        self._previous, self._marks_item = word, marks_item
        count = self._count_of(blank, word)
        base = self._base
        if count > self.size and end - start > WORD_PART:
            for part in range(start, end, WORD_PART):
                stop = min(part + WORD_PART, end)
                front = blank if part == start else ""
                count = self._count_of(front, text[part:stop])
                self._add_word((base + part, base + stop, count), found)
        else:
            self._add_word((base + start, base + end, count), found)

    def _count_of(self, blank: str, word: str) -> int:
        """How many words or tokens a word counts as, with the white space `blank` before it."""
        if self._tokenizer is None:
            return -(-len(word) // WORD_PART)
        key = blank + word
        known = self._counts.get(key)
        if known is None:
            if len(self._counts) >= _MAX_COUNTS:
                self._counts.clear()
            known = max(1, len(self._tokenizer(key, add_special_tokens=False).input_ids))
            self._counts[key] = known
        return known

    def _add_word(self, word: _Span, found: list[Chunk]) -> None:
        """Add a word to the open sentence; what no longer fits beside it becomes a chunk."""
        self._words.append(word)
        self._total += word[2]
        self._drop_repeated()
        if self._total > self.size and self._sentences:
            self._append_chunk(self._sentences, found)
            self._sentences = self._repeated_end(self._sentences)
            self._repeated = len(self._sentences)
            self._total = _total_count(self._sentences) + _total_count(self._words)
            self._drop_repeated()
        if self._total > self.size and len(self._words) > 1:
            # The sentence alone is too long.
            self._append_chunk(self._words[:-1], found)
            kept = self._repeated_end(self._words[:-1])
            while kept and _total_count(kept) + word[2] > self.size:
                del kept[0]
            self._words = [*kept, word]
            self._total = _total_count(self._words)

    def _drop_repeated(self) -> None:
        """Repeat less where the open sentence would not fit otherwise."""
        # A new sentence after the repeated ones means that their chunk has begun.
        if self._repeated < len(self._sentences):
            return
        while self._repeated and self._total > self.size:
            self._total -= self._sentences.pop(0)[2]
            self._repeated -= 1

    def _end_sentence(self) -> None:
        if self._words:
            self._sentences.append(
                (self._words[0][0], self._words[-1][1], _total_count(self._words))
            )
            self._words = []

    def _repeated_end(self, spans: list[_Span]) -> list[_Span]:
        """The last of `spans` that together count at most `overlap`."""
        first, count = len(spans), 0
        while first > 0 and count + spans[first - 1][2] <= self.overlap:
            first -= 1
            count += spans[first][2]
        return spans[first:]

    def _append_chunk(self, spans: list[_Span], found: list[Chunk]) -> None:
        start, end = spans[0][0], spans[-1][1]
        found.append(Chunk(self._text[start - self._base : end - self._base], start, end))

    def _end_chunk(self, found: list[Chunk]) -> None:
        """Make a chunk of what there is, and begin a new one after it."""
        self._end_sentence()
        if self._sentences:
            self._append_chunk(self._sentences, found)
        self._sentences, self._repeated, self._total = [], 0, 0
        self._previous, self._marks_item = None, False

    def _drop_finished_text(self) -> None:
        """Drop the text before everything that is still needed."""
        needed = self._at
        if self._words:
            needed = self._words[0][0]
        if self._sentences:
            needed = self._sentences[0][0]
        if needed > self._base:
            self._text = self._text[needed - self._base :]
            self._base = needed


def _total_count(spans: list[_Span]) -> int:
    return sum(span[2] for span in spans)
