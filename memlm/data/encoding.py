"""Rows as tokens and labels, before they are cut into segments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.data.chat import encode_chat_completion, encode_messages
from memlm.data.rows import CompletionRow, DocumentRow, MessagesRow, Row, TextRow, TokensRow
from memlm.segment import IGNORE
from memlm.tasks.asking import encode_answer, encode_question
from memlm.tokens import encode_after, encode_texts, encode_with_spans, leading_tokens, tokens_begun

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class AskedTokens:
    """A question as tokens, asked when the first `read` tokens of its document have been read.

    prompt (P,), answer (A,) with the end token.
    """

    read: int
    prompt: Ids
    answer: Ids


class Encoder:
    """Encodes rows with a tokenizer, as the model reads text and is asked later.

    question_template: the text that asks a question, with {question} in it. split_special_tokens: control
    tokens written out in a text are text. ValueError names the row that gives no token to learn.
    """

    def __init__(
        self, tokenizer: Any, question_template: str, split_special_tokens: bool = True
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        self.tokenizer = tokenizer
        self.question_template = question_template
        self.split = split_special_tokens
        self._leading = leading_tokens(tokenizer)

    def encode(self, row: Row) -> tuple[Ids, Ids]:
        """Tokens (N,) and labels (N,) of a row without questions. Labels are not shifted."""
        if isinstance(row, TokensRow):
            return self._checked(row)
        if isinstance(row, MessagesRow):
            ids, labels = encode_messages(self.tokenizer, row, self.split)
        elif isinstance(row, TextRow):
            ids = [*self._leading, *self._texts(row.text), self.tokenizer.eos_token_id]
            labels = ids
        elif isinstance(row, CompletionRow):
            ids, labels = self._completion(row)
        else:
            raise TypeError(f"{type(row).__name__} has questions; use encode_document")
        return np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64)

    def encode_document(self, row: DocumentRow) -> tuple[Ids, list[AskedTokens]]:
        """Tokens (N,) of the documents, one after the other, and their questions in the order of asking."""
        text = row.text
        (ids,), (spans,) = encode_with_spans(self.tokenizer, [text])
        if not self.split:
            ids, spans = self._texts(text), None
        starts = None if spans is None else np.array([begin for begin, _ in spans])
        asked = []
        for (at, _), (prompt, answer) in zip(row.asked, self.encode_questions(row), strict=True):
            begun = (
                tokens_begun(self._texts, text, at)
                if starts is None
                else int(np.searchsorted(starts, at))
            )
            asked.append(AskedTokens(len(self._leading) + begun, prompt, answer))
        return np.array([*self._leading, *ids], dtype=np.int64), asked

    def encode_questions(self, row: DocumentRow) -> list[tuple[Ids, Ids]]:
        """Prompt and answer of every question of a row, in the order of asking."""
        found = []
        for _, question in row.asked:
            asked = question.question.strip()
            prompt = encode_question(self.tokenizer, asked, self.question_template)
            answer = encode_answer(self.tokenizer, question.answer.strip())
            if len(answer) < 2:
                raise ValueError(
                    f"{row.where}: the answer {question.answer!r} has no token in this tokenizer; "
                    "give another, or leave the question out"
                )
            found.append((prompt.astype(np.int64), answer.astype(np.int64)))
        return found

    def _completion(self, row: CompletionRow) -> tuple[list[int], list[int]]:
        if not isinstance(row.prompt, str) or not isinstance(row.completion, str):
            ids, labels = encode_chat_completion(self.tokenizer, row, self.split)
        else:
            prompt = [*self._leading, *self._texts(row.prompt)]
            completion = encode_after(self._texts, row.prompt, row.completion)
            if completion:
                completion = [*completion, self.tokenizer.eos_token_id]
            ids, labels = [*prompt, *completion], [IGNORE] * len(prompt) + completion
        if all(label == IGNORE for label in labels):
            raise ValueError(
                f"{row.where}: completion has no token in this tokenizer; leave the row out"
            )
        return ids, labels

    def _checked(self, row: TokensRow) -> tuple[Ids, Ids]:
        largest = max(*row.input_ids, *row.labels)
        if largest >= len(self.tokenizer):
            raise ValueError(
                f"{row.where}: token {largest} is none of the tokenizer's {len(self.tokenizer)}; use the "
                "tokenizer that made the rows"
            )
        return np.array(row.input_ids), np.array(row.labels)

    def _texts(self, text: str) -> list[int]:
        return encode_texts(self.tokenizer, [text], self.split)[0]
