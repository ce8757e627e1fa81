"""Turns of a dialogue as a tokenizer's chat template writes them, and what of that is the template's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memlm.text import check_characters
from memlm.tokens import Part, fill, joined

Message = Mapping[str, str]
# Stands for what a message says while the template's own part is found.
MARK = "what-message-{}-says"


def as_messages(turns: str | Sequence[Message]) -> list[dict[str, str]]:
    """`turns` as a list of messages; a string is what the user says. ValueError for what is no message."""
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    for number, message in enumerate(turns):
        known = isinstance(message, Mapping) and set(message) == {"role", "content"}
        if not known or not all(isinstance(value, str) for value in message.values()):
            raise ValueError(
                f"messages[{number}]={message!r} is no turn of text; give dicts with 'role' and 'content'"
            )
        check_characters(f"messages[{number}]", message["content"])
    if not turns or not any(message["content"].strip() for message in turns):
        raise ValueError(f"messages={turns!r} says nothing; give at least one turn with text")
    if turns[-1]["role"] == "assistant":
        raise ValueError("messages ends with the assistant's turn; end with what it is to answer")
    return [dict(message) for message in turns]


def turn_of(
    tokenizer: Any, before: Sequence[Message], new: Sequence[Message]
) -> tuple[list[Part], str]:
    """What the chat template writes for the messages `new` behind `before`, up to where the answer begins.

    Also what it writes behind an answer. ValueError where the template is missing, writes `before` in
    another way when more follows, or changes what messages say.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "tokenizer has no chat template; set tokenizer.chat_template, or use stream.ask"
        )

    def written(messages: Sequence[Message], answers: bool) -> str:
        return tokenizer.apply_chat_template(
            [dict(one) for one in messages], tokenize=False, add_generation_prompt=answers
        )

    names = [MARK.format(number) for number in range(len(new))]
    marked = [{**one, "content": name} for one, name in zip(new, names, strict=True)]
    answer = MARK.format("the-answer")
    start = written(before, False) if before else ""
    whole = written([*before, *marked], True)
    closed = written([*before, *marked, {"role": "assistant", "content": answer}], False)
    if not whole.startswith(start) or not closed.startswith(whole + answer):
        raise ValueError(
            "tokenizer.chat_template writes earlier turns, or an answer, in another way when more follows, "
            "so that a dialogue cannot be remembered as it was said; set a template that only adds"
        )
    own = whole[len(start) :]
    real = written([*before, *new], True)[len(start) :]
    for name in names:
        own = own.replace(name, "{" + name + "}")
    for said in ([one["content"] for one in new], [one["content"].strip() for one in new]):
        parts = fill(own, **dict(zip(names, said, strict=True)))
        if joined(parts) == real:
            return parts, closed[len(whole + answer) :]
    raise ValueError(
        "tokenizer.chat_template changes what messages say; set one that writes them as they are"
    )
