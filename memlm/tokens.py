"""Text becomes tokens here: as text, not as control tokens, and long texts block by block.

A control token (`</s>`, `<|endoftext|>`, `<|im_end|>`) that is written out in a text is spelled like any
other text. Only a template may bring control tokens, never the text that is put into it.

A long text is tokenised in blocks. Where a block ends depends on the text alone: it is where the tokeniser
itself puts a border, both when it sees `AHEAD` characters more and when it starts a little earlier. So the
tokens are those of the whole text, with one exception: in a run without a blank that is longer than half a
block they may differ. There the tokeniser may decide by text further away, it may have several equally
good spellings to choose from (Unigram, in text that repeats itself), or there may be no border at all. Even
then the tokens decode to the same text, unless the tokeniser treats long words as unknown: it may know the
parts of a word that was cut.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

Encode = Callable[[str], list[int]]
# A stretch of a prompt, and whether a template wrote it, which makes its control tokens real.
Part = tuple[str, bool]
Spans = list[tuple[int, int]]

# Characters looked at after a border before it counts: twice the longest token there is.
AHEAD = 256
# How many characters before a border tokenising starts again: multiples of the lengths of tokens that stand
# for runs of one repeated character, 2, 4, ... 128 and 3, 5, 6, 10, 12, 24, ...; the last two are one less,
# for tokenisers that put a space before every text.
BACK = (256, 240, 255, 239)
# Borders tried, as many as the longest token has characters, and how many of each of the likelier kinds.
TRIES, LIKELY = 128, 4
# What may stand before a continued text when a token reaches over from what really does: a tokeniser that
# puts a space before every text must not put one here.
ANCHORS = ("\n", ".", "a")

# A fast tokenizer keeps the settings of a call inside, so two threads must not call it at once.
_CALLING = threading.Lock()
_CONTROL: WeakKeyDictionary[Any, tuple[Any, dict[int, str]]] = WeakKeyDictionary()


def encode_texts(
    tokenizer: Any, texts: Sequence[str], split_special_tokens: bool = True
) -> list[list[int]]:
    """Tokenise each text by itself, without special tokens around it.

    split_special_tokens: control tokens written out in a text are spelled as text; False makes them
    control tokens.
    """
    return _encode(tokenizer, texts, split_special_tokens, False)[0]


def encode_with_spans(
    tokenizer: Any, texts: Sequence[str]
) -> tuple[list[list[int]], list[Spans | None]]:
    """`encode_texts`, with the characters that each token covers; None where that is not known."""
    return _encode(tokenizer, texts, True, bool(tokenizer.is_fast))


def _encode(
    tokenizer: Any, texts: Sequence[str], split: bool, spans: bool
) -> tuple[list[list[int]], list[Spans | None]]:
    if not texts:
        return [], []
    with _CALLING:
        encoded = tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=spans,
            verbose=False,
            split_special_tokens=split,
        )
    found: list[list[int]] = encoded["input_ids"]
    covered: list[Spans | None] = encoded["offset_mapping"] if spans else [None] * len(texts)
    if split:
        control = control_tokens(tokenizer)
        for number, ids in enumerate(found):
            if control.keys().isdisjoint(ids):
                continue
            # The vocabulary itself holds the written form (Unigram and word models).
            literals = {control[token] for token in ids if token in control}
            breaks = _inside(texts[number], literals)
            if breaks:
                found[number] = _broken(
                    lambda part: encode_texts(tokenizer, [part])[0], texts[number], breaks
                )
                covered[number] = None
    return found, covered


def encode_parts(
    tokenizer: Any, parts: Iterable[Part], split_special_tokens: bool = True
) -> list[int]:
    """Tokenise a filled template: its own control tokens are control tokens, all others are spelled out.

    Without control tokens in what was filled in, the tokens are those of the joined text.
    """
    parts = [part for part in parts if part[0]]
    text = "".join(text for text, _ in parts)

    def encode(part: str) -> list[int]:
        return encode_texts(tokenizer, [part], split_special_tokens=False)[0]

    if not text:
        return []
    breaks: set[int] = set()
    if split_special_tokens:
        start, meant = 0, []
        for part, by_template in parts:
            if by_template:
                meant.append(range(start, start + len(part) + 1))
            start += len(part)
        literals = {literal for literal in control_tokens(tokenizer).values() if literal in text}
        for literal in literals:
            for at in _places(text, literal):
                if not any(at in span and at + len(literal) in span for span in meant):
                    breaks.add(at + 1)
    return _broken(encode, text, breaks) if breaks else encode(text)


def fill(template: str, **filled: str) -> list[Part]:
    """The parts of a template whose `{name}`s are filled, in one pass."""
    if not filled:
        return [(template, True)]
    pieces = re.split("\\{(" + "|".join(map(re.escape, filled)) + ")\\}", template)
    return [
        (filled[piece], False) if number % 2 else (piece, True)
        for number, piece in enumerate(pieces)
    ]


def joined(parts: Iterable[Part]) -> str:
    """The text that parts make."""
    return "".join(text for text, _ in parts)


def control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id and written form of the tokens that the tokenizer calls special."""
    version = (len(tokenizer), tuple(tokenizer.all_special_tokens))
    known = _CONTROL.get(tokenizer)
    if known is None or known[0] != version:
        added = {
            i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        # A token of one character cannot be spelled in another way.
        known = version, {i: text for i, text in (added | named).items() if len(text) > 1}
        _CONTROL[tokenizer] = known
    return known[1]


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens a tokenizer puts before a document."""
    with _CALLING:
        whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    at = next((i for i, token in enumerate(whole) if token == bare[0]), 0) if bare else 0
    return list(whole[:at])


def encode_after(encode: Encode, context: str | None, text: str) -> list[int]:
    """The tokens of `text` as it continues `context`; a `context` of None is the document's start."""
    if context is None:
        return encode(text)
    for before in (context, *ANCHORS):
        found = _tokens_after(encode, before, text) if before else None
        if found is not None:
            return found
    return encode(text)


def next_block(
    encode: Encode, context: str | None, text: str, block: int
) -> tuple[list[int], str, str] | None:
    """Take about `block` characters off `text`, which continues `context`.

    Returns their tokens, the context of the rest, and the rest; None while `text` is shorter than
    block + AHEAD characters. What lies further on in `text` is not looked at.
    """
    if len(text) < block + AHEAD:
        return None
    seen = text[: block + AHEAD]
    whole = encode_after(encode, context, seen)
    for at in _borders(seen, block):
        before = (context or "") + seen[:at]
        for back in BACK:
            near = before[-back:]
            tail = _tokens_after(encode, near, seen[at:])
            if tail is not None and whole[len(whole) - len(tail) :] == tail:
                return whole[: len(whole) - len(tail)], near, text[at:]
    # The tokeniser has no border here: a token that is cut is spelled by others, and nothing is lost.
    at = next(_borders(seen, block))
    return encode_after(encode, context, seen[:at]), "", text[at:]


def tokens_begun(encode: Encode, text: str, at: int) -> int:
    """How many tokens of `text` begin in its first `at` characters."""
    whole = encode(text)
    for end in range(at, min(at + AHEAD, len(text)) + 1):
        begun = encode(text[:end])
        if whole[: len(begun)] == begun:
            return len(begun)
    begun = encode(text[:at])
    pairs = enumerate(zip(whole, begun, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(whole), len(begun)))


def _tokens_after(encode: Encode, context: str, text: str) -> list[int] | None:
    """The tokens of `text` after `context`; None where a token would reach over the border."""
    known, ids = encode(context), encode(context + text)
    return ids[len(known) :] if ids[: len(known)] == known else None


def _borders(text: str, block: int) -> Iterator[int]:
    """Where a block of `text` may end, the likeliest first.

    Before a single space between words, where every tokeniser splits; else before white space;
    else beside a mark; else anywhere, from the back.
    """
    back = range(block - 1, block // 2, -1)

    def is_space(at: int) -> bool:
        return text[at] == " " and not (text[at - 1].isspace() or text[at + 1].isspace())

    def starts_space(at: int) -> bool:
        return text[at].isspace() and not text[at - 1].isspace()

    def beside_mark(at: int) -> bool:
        return text[at].isalnum() != text[at - 1].isalnum()

    for likely in (is_space, starts_space, beside_mark):
        found = 0
        for at in back:
            if likely(at):
                yield at
                found += 1
                if found == LIKELY:
                    break
    yield from range(block, max(block // 2, block - TRIES), -1)


def _places(text: str, literal: str) -> Iterator[int]:
    """Where `literal` begins in `text`, overlapping ones too."""
    at = text.find(literal)
    while at >= 0:
        yield at
        at = text.find(literal, at + 1)


def _inside(text: str, literals: Iterable[str]) -> set[int]:
    return {at + 1 for literal in literals for at in _places(text, literal)}


def _broken(encode: Encode, text: str, breaks: Iterable[int]) -> list[int]:
    """Tokenise `text` with a border at each of `breaks`, so that no token reaches over one."""
    starts = [0, *sorted(breaks), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(starts)]
    ids = encode(parts[0])
    for part in parts[1:]:
        # Together with the text before, it would make the control token whole again.
        ids = ids + encode_after(encode, "", part)
    return ids
