"""A sample in the published layout: an object with columns input, question and target."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from memlm.tasks.asking import encode_question
from memlm.tasks.babi.story import Story
from memlm.templates import BABILONG_QUESTION_TEMPLATE
from memlm.tokens import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["json", "parquet"]

COLUMNS = ("input", "question", "target")
_PIECE_CHARACTERS = 1 << 13
_PIECES_AT_ONCE = 16
_PIECE_TOKENS = 1 << 16

# A blank between two words: byte-level tokenizers never join across one.
_CUT = re.compile(r"(?<=\S) (?=\S)")


class Record(TypedDict):
    """A ready-made sample, with the columns of the published data sets."""

    input: str
    question: str
    target: str


class RecordSample:
    """A ready-made sample for an evaluation, read like a composed `Sample`.

    Where its facts stand is not known, so there are neither `fact_offsets` nor facts in `story`. The
    text follows one space, as a composed document does. Tokens are counted when first asked for.
    """

    fact_offsets: tuple[int, ...] = ()

    def __init__(self, record: Record, task: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.record = record
        self.task = task
        self.tokenizer = tokenizer
        self.question = record["question"]
        self.target = record["target"]
        self.story = Story([], self.question, self.target, [], task)

    @property
    def tokens(self) -> int:
        return len(self._flat)

    def __len__(self) -> int:
        return self.tokens

    def ids(self) -> Iterator[NDArray[np.int32]]:
        """Yield the document's token ids in order, in pieces; read-only views, do not write."""
        for begin in range(0, len(self._flat), _PIECE_TOKENS):
            yield self._flat[begin : begin + _PIECE_TOKENS]

    def __iter__(self) -> Iterator[str]:
        """Yield the document's text in pieces, each but the first cut before a blank."""
        text = self.record["input"].strip()
        yield from _cut_at_blanks(f" {text}" if text else "")

    def text(self) -> str:
        """Return the whole document."""
        return "".join(self)

    def question_ids(self, template: str = BABILONG_QUESTION_TEMPLATE) -> NDArray[np.int32]:
        """Return what `encode_question` does."""
        return encode_question(self.tokenizer, self.question, template)

    @functools.cached_property
    def _flat(self) -> NDArray[np.int32]:
        # In pieces: a tokenizer's record of a text is many times the size of the text.
        parts = [np.zeros(0, dtype=np.int32)]
        pieces = iter(self)
        while batch := list(islice(pieces, _PIECES_AT_ONCE)):
            parts += [np.array(ids, dtype=np.int32) for ids in encode_texts(self.tokenizer, batch)]
        flat = np.concatenate(parts)
        flat.flags.writeable = False
        return flat


def _cut_at_blanks(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > _PIECE_CHARACTERS:
        end = begin + _PIECE_CHARACTERS
        at = text.rfind(" ", begin + 1, end)
        # Cut at the last blank in most cases; a run of blanks must stay whole.
        found = _CUT.search(text, at if at > 0 else end)
        if found is None:
            break
        yield text[begin : found.start()]
        begin = found.start()
    if begin < len(text):
        yield text[begin:]
