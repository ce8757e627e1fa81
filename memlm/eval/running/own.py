"""A person's own questions about their own documents, as samples of an evaluation.

Rows are `{"document", "questions": [{"question", "answer", "at"?}]}`, or several documents read one after
the other (`memlm.data`). Questions are grouped by how much was read before they are asked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.data import DocumentRow, Row, open_rows
from memlm.data.encoding import Encoder
from memlm.eval.running.samples import Sampled, SampleSource
from memlm.tasks.asking import encode_answer
from memlm.tasks.babi import Story
from memlm.tasks.lengths import parse_length
from memlm.tasks.scoring import exact_match, normalised_match, token_f1
from memlm.tasks.task import Score, Task
from memlm.tokens import leading_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The name of the one task they are.
QUESTIONS = "questions"
# The shortest group; every further one is twice as long.
SHORTEST = 256
_PIECE_TOKENS = 1 << 16
_DATA = (".jsonl", ".ndjson", ".json", ".parquet", ".csv")


def are_own_questions(data: str | os.PathLike[str] | None) -> bool:
    """Whether `data` names rows of own questions, and not a data set in the published layout.

    A file does, or a folder whose data files all lie in it directly: the published layout has them in
    folders by task or length. Of the hub, "hub:ID" does.
    """
    if data is None:
        return False
    name = os.fspath(data)
    path = Path(name).expanduser()
    if path.is_dir():
        places = {file.parent for file in path.rglob("*") if file.suffix.lower() in _DATA}
        return places == {path}
    return path.is_file() or name.startswith("hub:")


class OwnSample:
    """One question, and the document as far as it is read before.

    Where its fact stands is taken to be where the answer was last said, by its share of the characters.
    """

    task = QUESTIONS

    def __init__(self, text: str, ids: NDArray[np.int32], question: str, target: str) -> None:
        self._text = text
        self._ids = ids
        self.question = question
        self.target = target
        self.tokens = len(ids)
        said = text.lower().rfind(target.lower())
        self.fact_offsets = () if said < 0 else (said * len(ids) // len(text),)
        supporting = [0] * len(self.fact_offsets)
        self.story = Story([target], question, target, supporting, QUESTIONS)

    def ids(self) -> Iterator[NDArray[np.int32]]:
        """Yield the document's token ids in order, in pieces; read-only views, do not write."""
        for begin in range(0, len(self._ids), _PIECE_TOKENS):
            yield self._ids[begin : begin + _PIECE_TOKENS]

    def __iter__(self) -> Iterator[str]:
        yield self._text


class Encoded(NamedTuple):
    """A row, its tokens, and how many of them are read before each of its questions."""

    number: int
    row: DocumentRow
    ids: NDArray[np.int32]
    reads: list[int]


class OwnQuestions(SampleSource):
    """The questions of `data`, the first `limit` of them; None is all.

    ValueError names the row that is none, or data without questions.
    """

    def __init__(
        self,
        data: str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.data = os.fspath(data)
        self._encoder = Encoder(tokenizer, "{question}")
        self._leading = len(leading_tokens(tokenizer))
        rows = open_rows(data)
        # Those of the hub come one after the other, and are held.
        self._rows: Sequence[Row] = rows if isinstance(rows, Sequence) else list(rows)
        self._held: Encoded | None = None
        # By length: the row, and the number of the question in it.
        self._cells: dict[int, list[tuple[int, int]]] = {}
        self._asked: dict[tuple[int, int], tuple[str, str]] = {}
        known = hashlib.blake2b(digest_size=8)
        longest = 1
        for number in range(len(self._rows)):
            row = self._row(number)
            known.update(row.text.encode())
            reads = self._encoded(number).reads
            for order, ((_, question), read) in enumerate(zip(row.asked, reads, strict=True)):
                if limit is not None and len(self._asked) == limit:
                    break
                self._cells.setdefault(_group(read), []).append((number, order))
                target = question.answer.strip()
                self._asked[number, order] = (question.question.strip(), target)
                longest = max(longest, len(encode_answer(tokenizer, target)))
        self._digest = known.hexdigest()
        # With its end.
        self._task = Task(QUESTIONS, _tells_none, _mark, answer_tokens=longest)

    @property
    def cells(self) -> dict[tuple[str, int], int]:
        """How many questions there are of each length, shortest first."""
        return {(QUESTIONS, length): len(self._cells[length]) for length in sorted(self._cells)}

    def settings(self) -> dict[str, Any]:
        return {"data": self.data, "data_digest": self._digest}

    def task(self, name: str) -> Task:
        return self._task

    def prepare(self, task: str, length: int, samples: int) -> int:
        count = len(self._cells[length])
        self._note(task, length, {"source": self.data, "samples": count})
        return count

    def holds(self, row: Mapping[str, Any]) -> bool:
        cell = self._cells.get(parse_length(row["length"]), [])
        asked = self._asked[cell[row["index"]]] if row["index"] < len(cell) else None
        return asked == (row["question"], row["target"])

    def document(self, task: str, length: int, index: int) -> Hashable:
        number, order = self._cells[length][index]
        return number, self._row(number).asked[order][0]

    def get(self, task: str, length: int, index: int) -> Sampled:
        number, order = self._cells[length][index]
        found = self._encoded(number)
        at, _ = found.row.asked[order]
        question, target = self._asked[number, order]
        return OwnSample(found.row.text[:at], found.ids[: found.reads[order]], question, target)

    def _row(self, number: int) -> DocumentRow:
        row = self._rows[number]
        if not isinstance(row, DocumentRow):
            raise ValueError(
                f"{row.where} is a {type(row).__name__}; to ask questions, give rows of "
                '"document" and "questions", of "document", "question" and "answer", or of "documents"; '
                "samples in the published layout are named by their folder"
            )
        return row

    def _encoded(self, number: int) -> Encoded:
        """A row with its tokens; the last one is held."""
        if self._held is None or self._held.number != number:
            row = self._row(number)
            found, asked = self._encoder.encode_document(row)
            # The start token is put before the prompt, which may begin with an instruction.
            ids = found[self._leading :].astype(np.int32)
            ids.flags.writeable = False
            self._held = Encoded(number, row, ids, [one.read - self._leading for one in asked])
        return self._held


def _group(tokens: int) -> int:
    """The length under which a question is counted: tokens read before it, rounded up to a power of two."""
    length = SHORTEST
    while length < tokens:
        length *= 2
    return length


def _mark(output: str, target: str, question: str) -> Score:
    right = normalised_match(output, target)
    return Score(right, right, exact_match(output, target), token_f1(output, target))


def _tells_none(seed: Any) -> Any:
    raise NotImplementedError("own questions are read, not told")
