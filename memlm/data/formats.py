"""From the columns of a row to what it is, as trl tells its formats apart, and what is wrong with it.

A data set has one format. Columns that belong to none are left alone, as trl leaves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from memlm.data.rows import (
    IGNORE,
    AskedDocument,
    CompletionRow,
    DocumentRow,
    MessagesRow,
    Question,
    Row,
    TextRow,
    TokensRow,
)

KNOWN = (
    '"document" and "questions", "document", "question" and "answer", "documents", "input_ids" (and '
    '"labels"), "prompt" and "completion", "messages" or "text"'
)


@dataclass(frozen=True)
class Format:
    """A format of rows. columns: those that a row must have; make: from them, and where it came from.

    asks: whether its rows are documents with questions.
    """

    name: str
    columns: tuple[str, ...]
    make: Callable[[Mapping[str, Any], str], Row]
    asks: bool = False


def find_format(columns: Mapping[str, Any]) -> Format | None:
    """The format of a row by its columns; None when it has those of none.

    A column that is None is absent: tables fill with it what a row does not have.
    """
    has = {name for name, value in columns.items() if value is not None}
    return next((known for known in FORMATS if has.issuperset(known.columns)), None)


def make_row(values: Any, where: str, expected: Format | None = None) -> tuple[Row, Format]:
    """A row from its plain `values`, and its format.

    expected: the format of the rows before. ValueError names the row, the key and the remedy.
    """
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{where} is {_kind(values)}, not an object; give a row the columns {KNOWN}"
        )
    found = find_format(values)
    if found is None:
        known = ", ".join(map(repr, values)) or "none"
        wanted = _wanted(expected) if expected else KNOWN
        lacking = "empty" if any(value is None for value in values.values()) else "missing"
        raise ValueError(
            f"{where} has the columns {known}, and what is expected is {lacking}; give {wanted}"
        )
    if expected is not None and found is not expected:
        raise ValueError(
            f"{where} has the columns of {found.name!r}, the rows before those of {expected.name!r}; "
            "give all rows of a data set one format"
        )
    return found.make(values, where), found


def _wanted(expected: Format) -> str:
    return " and ".join(f'"{name}"' for name in expected.columns) + ", as the rows before"


def _documents(values: Mapping[str, Any], where: str) -> Row:
    parts = _list(values, "documents", where)
    if not parts:
        raise ValueError(f"{where}: documents is empty; give at least one document")
    made = [_asked(part, f"{where}: documents[{number}]") for number, part in enumerate(parts)]
    if not any(part.questions for part in made):
        raise ValueError(
            f"{where}: no document has a question; give at least one, or use rows of text"
        )
    return DocumentRow(tuple(made), where)


def _document(values: Mapping[str, Any], where: str) -> Row:
    made = _asked(values, where)
    if not made.questions:
        raise ValueError(
            f"{where}: questions is empty; give at least one, or use rows of text for documents without"
        )
    return DocumentRow((made,), where)


def _one_question(values: Mapping[str, Any], where: str) -> Row:
    document = _text(values, "document", where)
    at = values.get("at")
    # A cell of a CSV file is text, and empty where there is nothing.
    if isinstance(at, str) and (at.isdecimal() or not at):
        at = int(at) if at else None
    question = _question({**values, "at": at}, document, where)
    return DocumentRow((AskedDocument(document, (question,)),), where)


def _asked(values: Any, where: str) -> AskedDocument:
    if not isinstance(values, Mapping):
        raise ValueError(
            f'{where} is {_kind(values)}; write {{"document": ..., "questions": [...]}}'
        )
    document = _text(values, "document", where)
    questions = _list(values, "questions", where) if values.get("questions") is not None else []
    made = tuple(
        _question(question, document, f"{where}: questions[{number}]")
        for number, question in enumerate(questions)
    )
    return AskedDocument(document, made)


def _question(values: Any, document: str, where: str) -> Question:
    if not isinstance(values, Mapping):
        raise ValueError(f'{where} is {_kind(values)}; write {{"question": ..., "answer": ...}}')
    at = values.get("at")
    if at is not None:
        whole = isinstance(at, int) and not isinstance(at, bool)
        if not whole or not 0 < at <= len(document):
            raise ValueError(
                f"{where}: at={at!r} is no place in its document of {len(document)} characters; give the "
                f"number of characters read before the question, 1 to {len(document)}"
            )
    return Question(_text(values, "question", where), _text(values, "answer", where), at)


def _tokens(values: Mapping[str, Any], where: str) -> Row:
    ids = _numbers(values, "input_ids", where, least=0)
    given = values.get("labels") is not None
    labels = _numbers(values, "labels", where, least=IGNORE) if given else ids
    mask = values.get("attention_mask")
    real = (
        _numbers(values, "attention_mask", where, least=0) if mask is not None else (1,) * len(ids)
    )
    for name, column in (("labels", labels), ("attention_mask", real)):
        if len(column) != len(ids):
            raise ValueError(
                f"{where}: {name} has {len(column)} entries, input_ids {len(ids)}; give as many"
            )
    kept = [(i, label) for i, label, r in zip(ids, labels, real, strict=True) if r]
    # The first token of a row is never predicted.
    if not any(label != IGNORE for _, label in kept[1:]):
        raise ValueError(
            f"{where}: labels has nothing to predict after the first token; give one label that is not "
            f"{IGNORE}"
        )
    return TokensRow(tuple(i for i, _ in kept), tuple(label for _, label in kept), where)


def _completion(values: Mapping[str, Any], where: str) -> Row:
    for name in ("prompt", "completion"):
        if not isinstance(values[name], (str, list)):
            raise ValueError(
                f"{where}: {name} is {_kind(values[name])}; give text or a list of messages"
            )
    kinds = {type(values[name]) for name in ("prompt", "completion")}
    if len(kinds) > 1:
        raise ValueError(
            f"{where}: one of prompt and completion is text and the other a list; give both alike"
        )
    read = _text if str in kinds else _messages
    prompt, completion = (read(values, name, where) for name in ("prompt", "completion"))
    return CompletionRow(prompt, completion, *_template_arguments(values, where), where)


def _conversation(values: Mapping[str, Any], where: str) -> Row:
    messages = _messages(values, "messages", where)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(
            f"{where}: messages has no turn of the role 'assistant', so there is nothing to learn; give "
            "at least one"
        )
    return MessagesRow(messages, *_template_arguments(values, where), where)


def _template_arguments(values: Mapping[str, Any], where: str) -> tuple[Any, Mapping[str, Any]]:
    given = values.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{where}: chat_template_kwargs is {_kind(given)}; give a mapping, or leave it out"
        )
    return values.get("tools"), given


def _messages(values: Mapping[str, Any], name: str, where: str) -> Any:
    messages = _list(values, name, where)
    if not messages:
        raise ValueError(f"{where}: {name} is empty; give at least one message")
    made = []
    for number, message in enumerate(messages):
        place = f"{where}: {name}[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f'{place} is {_kind(message)}; write {{"role": ..., "content": ...}}')
        # Arrow gives every message the keys of all.
        message = {key: value for key, value in message.items() if value is not None}
        if not isinstance(message.get("role"), str):
            raise ValueError(f"{place} has no role; give 'system', 'user' or 'assistant'")
        called = "tool_calls" in message and "content" not in message
        if not called and not isinstance(message.get("content"), str):
            raise ValueError(f"{place} has no content that is text; give one")
        made.append(message)
    return tuple(made)


def _text_row(values: Mapping[str, Any], where: str) -> Row:
    return TextRow(_text(values, "text", where), where)


def _text(values: Mapping[str, Any], name: str, where: str) -> str:
    if name not in values or values[name] is None:
        raise ValueError(f"{where} has no {name!r}; give one")
    value = values[name]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is {_kind(value)}; give text")
    if not value.strip():
        raise ValueError(f"{where}: {name} is empty; give some text, or leave the row out")
    return value


def _list(values: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = values[name]
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} is {_kind(value)}; give a list")
    return value


def _numbers(values: Mapping[str, Any], name: str, where: str, least: int) -> tuple[int, ...]:
    value = _list(values, name, where)
    for number, entry in enumerate(value):
        if not isinstance(entry, int) or isinstance(entry, bool) or entry < least:
            raise ValueError(
                f"{where}: {name}[{number}]={entry!r} is no token; give whole numbers from {least} on"
            )
    if not value:
        raise ValueError(f"{where}: {name} is empty; leave the row out")
    return tuple(value)


def _kind(value: Any) -> str:
    """A value's type as a reader of JSON would say it."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


# In the order in which they are looked for. trl takes tokens before prompts, prompts before messages, and
# messages before text.
FORMATS = (
    Format("documents", ("documents",), _documents, asks=True),
    Format("document", ("document", "questions"), _document, asks=True),
    Format("input_ids", ("input_ids",), _tokens),
    Format("prompt", ("prompt", "completion"), _completion),
    Format("messages", ("messages",), _conversation),
    Format("text", ("text",), _text_row),
    # Last, so that chats and texts with such columns beside them are read as trl reads them.
    Format("question", ("document", "question", "answer"), _one_question, asks=True),
)
