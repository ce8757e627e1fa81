"""What a row of training or evaluation data can be, as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# transformers' label for no target. As in memlm.segment, which would bring torch with it.
IGNORE = -100
# Between documents that are read one after the other.
DOCUMENT_BREAK = "\n\n"
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A question about what has been read, with its answer.

    at: the number of characters of its document that have been read when it is asked; None is all of them.
    """

    question: str
    answer: str
    at: int | None = None


@dataclass(frozen=True)
class AskedDocument:
    """A document, and the questions that are asked while it is read or when it has been read."""

    document: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class DocumentRow:
    """Documents read one after the other into one memory; later ones may ask about earlier ones.

    where: the file and line, or the data set and row, that it came from.
    """

    documents: tuple[AskedDocument, ...]
    where: str = ""

    @property
    def text(self) -> str:
        """All documents as one text, with a blank line between them."""
        return DOCUMENT_BREAK.join(part.document for part in self.documents)

    @property
    def asked(self) -> list[tuple[int, Question]]:
        """All questions in the order of asking, each with the characters of `text` read before it."""
        found, start = [], 0
        for part in self.documents:
            for question in part.questions:
                at = len(part.document) if question.at is None else question.at
                found.append((start + at, question))
            start += len(part.document) + len(DOCUMENT_BREAK)
        return sorted(found, key=lambda pair: pair[0])


@dataclass(frozen=True)
class TextRow:
    """A text to model: every token is a target."""

    text: str
    where: str = ""


@dataclass(frozen=True)
class MessagesRow:
    """A conversation: only what the assistant says is a target.

    tools, template_arguments: what the tokenizer's chat template is given besides the messages.
    """

    messages: Messages
    tools: Any = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class CompletionRow:
    """A prompt and its completion, both text or both messages: only the completion is a target."""

    prompt: str | Messages
    completion: str | Messages
    tools: Any = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class TokensRow:
    """Tokens, and the labels to predict, -100 for none. Not shifted: the label of a token is the token."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str = ""


Row = DocumentRow | TextRow | MessagesRow | CompletionRow | TokensRow


def texts_of(row: Row) -> Iterator[str]:
    """The texts in a row, as a tokenizer is trained on them."""
    if isinstance(row, TextRow):
        yield row.text
    elif isinstance(row, DocumentRow):
        yield row.text
        for _, question in row.asked:
            yield f"{question.question} {question.answer}"
    elif isinstance(row, TokensRow):
        raise ValueError(f"{row.where} holds tokens and no text; name the tokenizer that made them")
    else:
        given = [row.messages] if isinstance(row, MessagesRow) else [row.prompt, row.completion]
        for part in given:
            if isinstance(part, str):
                yield part
            else:
                yield from (str(message.get("content", "")) for message in part)
