"""Conversations as tokens: the tokenizer's chat template, and which tokens are what the assistant says.

A template marks them itself with `{% generation %}`. For one that does not, a turn is what the conversation
up to it has more than the conversation before it, with the template's own opening of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from memlm.data.rows import CompletionRow, MessagesRow
from memlm.segment import IGNORE
from memlm.tokens import (
    Part,
    control_tokens,
    encode_after,
    encode_parts,
    encode_texts,
    joined,
)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Characters for private use, which no text has.
_MARK, _MARKED = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")


def encode_messages(
    tokenizer: Any, row: MessagesRow, split_special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and its labels: -100 but for what the assistant says.

    ValueError names the row when the template is missing, fails, or leaves nothing to learn.
    """
    template = _Template(tokenizer, row, split_special_tokens)
    if template.marks_turns and not template.spelled_out(row.messages):
        ids, labels = template.marked(row.messages)
    else:
        ids, labels = template.by_prefixes(row.messages)
    if all(label == IGNORE for label in labels[1:]):
        raise ValueError(
            f"{row.where}: nothing of what the assistant says is left by the chat template; give a turn "
            "with content"
        )
    return ids, labels


def encode_chat_completion(
    tokenizer: Any, row: CompletionRow, split_special_tokens: bool = True
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and its completion, both messages: the completion is what is to be learned."""
    template = _Template(tokenizer, row, split_special_tokens)
    assert not isinstance(row.prompt, str) and not isinstance(row.completion, str)
    opened = row.prompt[-1].get("role") != "assistant"
    before = template.parts(row.prompt, opened)
    whole = template.parts([*row.prompt, *row.completion], False)
    at = template.check_prefix(before, whole, "the prompt")
    return template.encode(whole, [(at, len(joined(whole)))])


class _Template:
    """The chat template of `tokenizer`, filled for one row."""

    def __init__(self, tokenizer: Any, row: MessagesRow | CompletionRow, split: bool) -> None:
        self.tokenizer, self.row, self.split = tokenizer, row, split
        if not tokenizer.chat_template:
            raise ValueError(
                f"{row.where}: messages need a chat template, and the tokenizer has none; name a file "
                "with one in tokenizer.chat_template, or use a base model with one"
            )

    @property
    def marks_turns(self) -> bool:
        """Whether the template itself says what is generated, and the tokenizer can tell where."""
        template = self.tokenizer.chat_template
        return (
            self.tokenizer.is_fast
            and isinstance(template, str)
            and bool(_GENERATION.search(template))
        )

    def spelled_out(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a control token is written out in a message, where it is text."""
        literals = control_tokens(self.tokenizer).values() if self.split else ()
        contents = [str(message.get("content", "")) for message in messages]
        return any(literal in content for literal in literals for content in contents)

    def marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """Tokens and labels, as the template marks them."""
        filled = self._apply(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, said = list(filled["input_ids"]), filled["assistant_masks"]
        return ids, [i if own else IGNORE for i, own in zip(ids, said, strict=True)]

    def by_prefixes(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """Tokens and labels, each turn as what it adds to the conversation before it."""
        if messages[0]["role"] == "assistant":
            raise ValueError(
                f"{self.row.where}: the conversation begins with the assistant, and where its words begin "
                "cannot be told from what the template writes before them; begin with a system's or a "
                "user's message, or mark answers in the template with {% generation %}"
            )
        whole, spans = self.parts(messages, False), []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                name = f"messages[:{number + 1}]"
                after = self.parts(messages[: number + 1], False)
                begin = self.check_prefix(
                    self.parts(messages[:number], True), after, f"messages[:{number}]"
                )
                spans.append((begin, self.check_prefix(after, whole, name)))
        return self.encode(whole, spans)

    def parts(self, messages: Sequence[Mapping[str, Any]], opened: bool) -> list[Part]:
        """The filled template. opened: with the opening of an answer.

        What messages say is kept apart only where a control token is written out in it.
        """
        text = self._apply(messages, tokenize=False, add_generation_prompt=opened)
        if not self.spelled_out(messages):
            return [(text, True)]
        contents = [str(message.get("content", "")) for message in messages]
        marked = [
            {**m, "content": _MARK.format(n)} if "content" in m else m
            for n, m in enumerate(messages)
        ]
        pieces = _MARKED.split(self._apply(marked, tokenize=False, add_generation_prompt=opened))
        for clean in (str, str.strip):
            parts = [
                (clean(contents[int(piece)]), False) if number % 2 else (piece, True)
                for number, piece in enumerate(pieces)
            ]
            if joined(parts) == text:
                return parts
        raise ValueError(
            f"{self.row.where}: a message has a control token written out in it, and the chat template "
            "changes what messages say; remove the token, or set data.split_special_tokens=false"
        )

    def check_prefix(self, before: list[Part], after: list[Part], name: str) -> int:
        """The characters of `before`. ValueError when `after` does not begin with it."""
        text = joined(before)
        if not joined(after).startswith(text):
            raise ValueError(
                f"{self.row.where}: the chat template writes {name} in another way when more follows, so "
                "what the assistant says cannot be told from the rest; mark it in the template with "
                "{% generation %} (tokenizer.chat_template names a file)"
            )
        return len(text)

    def encode(
        self, parts: list[Part], spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[int]]:
        """Tokens and labels of a text with `spans` to be learned; no token reaches over their borders."""
        ids: list[int] = []
        labels: list[int] = []
        borders = [0, *(at for span in spans for at in span), len(joined(parts))]
        for number, (begin, end) in enumerate(pairwise(borders)):
            if begin == end:
                continue
            known = encode_parts(self.tokenizer, _cut(parts, 0, begin), self.split)
            found = encode_parts(self.tokenizer, _cut(parts, 0, end), self.split)
            if found[: len(known)] == known:
                found = found[len(known) :]
            elif len(parts) == 1:
                # A token would reach over the border, where an answer begins or ends by itself.
                found = encode_after(self._encode, "", parts[0][0][begin:end])
            else:
                found = encode_parts(self.tokenizer, _cut(parts, begin, end), self.split)
            ids += found
            labels += found if number % 2 else [IGNORE] * len(found)
        return ids, labels

    def _encode(self, text: str) -> list[int]:
        return encode_texts(self.tokenizer, [text], split_special_tokens=False)[0]

    def _apply(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=self.row.tools,
                **options,
                **self.row.template_arguments,
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"{self.row.where}: the chat template refuses it ({error}); give messages as the template "
                "wants them"
            ) from error


def _cut(parts: Sequence[Part], begin: int, end: int) -> Iterator[Part]:
    """The parts between two characters."""
    start = 0
    for text, by_template in parts:
        yield text[max(begin - start, 0) : max(end - start, 0)], by_template
        start += len(text)
