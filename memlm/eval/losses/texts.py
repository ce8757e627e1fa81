"""The documents whose loss is measured, as tokens."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memlm.tasks.babilong import format_length
from memlm.tasks.haystack import Haystack
from memlm.tokens import encode_with_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Sentences tokenised at a time: a document is read no further than it is used.
_SENTENCES = 256
_BLOCK = re.compile(r"(.*)#(\d+)")


@dataclass(frozen=True)
class Text:
    """A document to measure. ids (tokens,); sizes (tokens,) bytes of text of each token; joined: how many
    whole documents it is made of."""

    index: int
    name: str
    ids: NDArray[np.int32]
    sizes: NDArray[np.int64]
    joined: int = 1

    @property
    def digest(self) -> str:
        return hashlib.blake2b(self.ids.tobytes(), digest_size=8).hexdigest()


def choose_texts(
    haystack: Haystack,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    count: int,
    seed: int,
    split: str = "eval",
) -> list[Text]:
    """Take the first `tokens` tokens of documents that have as many, in the order of the seed.

    When there are too few of those, the shorter ones are joined whole and in order, each used once;
    fewer texts than `count` when those run out, ValueError when there is not even one.
    """
    pieces = _rejoined(haystack)
    order = np.random.default_rng([seed, 0]).permutation(len(pieces)).tolist()
    texts: list[Text] = []
    long: set[int] = set()
    for number in order:
        if len(texts) == count:
            return texts
        name, sentences = pieces[number]
        # Every token takes at least a byte: this many bytes are needed, and counting them costs little.
        if sum(len(sentence.encode()) + 1 for sentence in sentences) < tokens:
            continue
        ids, sizes = _tokenised(sentences, tokenizer, tokens)
        if len(ids) == tokens:
            texts.append(Text(len(texts), name, ids, sizes))
            long.add(number)
    held, names, parts = 0, [], []
    most = 0
    for number, (name, sentences) in enumerate(pieces):
        if len(texts) == count:
            return texts
        if number in long:
            continue
        # A text begins with a document: the rest of one whose beginning filled a text is dropped.
        parts.append(_tokenised(sentences, tokenizer, tokens - held))
        names.append(name)
        held += len(parts[-1][0])
        most = max(most, held)
        if held == tokens:
            ids, sizes = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
            texts.append(Text(len(texts), names[0], ids, sizes, len(names)))
            held, names, parts = 0, [], []
    if not texts:
        raise ValueError(
            f"haystack {haystack.source!r} has {most} tokens in split {split!r}, fewer than "
            f"length={format_length(tokens)}; give a shorter length, a longer text or split='all'"
        )
    return texts


def _rejoined(haystack: Haystack) -> list[tuple[str, list[str]]]:
    """Return the documents, with neighbouring blocks of one file made one again."""
    joined: list[tuple[str, list[str]]] = []
    before: tuple[str, int] | None = None
    for document in haystack.documents:
        match = _BLOCK.fullmatch(document.name)
        block = (match[1], int(match[2])) if match else None
        if block and before and block == (before[0], before[1] + 1):
            joined[-1][1].extend(document.sentences)
        else:
            joined.append((document.name, list(document.sentences)))
        before = block
    return joined


def _tokenised(
    sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the first `limit` ids of a text and the bytes of each, both (tokens,)."""
    ids: list[int] = []
    sizes: list[int] = []
    pending = iter(sentences)
    while len(ids) < limit:
        texts = [f" {sentence}" for sentence in itertools.islice(pending, _SENTENCES)]
        if not texts:
            break
        for text, found, spans in zip(texts, *encode_with_spans(tokenizer, texts), strict=True):
            ids += found
            sizes += _bytes_of(text, len(found), spans)
    return np.array(ids[:limit], dtype=np.int32), np.array(sizes[:limit], dtype=np.int64)


def _bytes_of(text: str, count: int, spans: Sequence[tuple[int, int]] | None) -> list[int]:
    """Share the bytes of a text among its `count` tokens, none counted twice or left out."""
    if not count:
        return []
    if spans is None:
        # A tokenizer that cannot say what its tokens cover: all get the same.
        ends = [len(text.encode()) * (number + 1) // count for number in range(count)]
    else:
        before = [0, *itertools.accumulate(len(character.encode()) for character in text)]
        # Tokens that share a character all end after it; its bytes go to the first of them.
        ends = list(itertools.accumulate((before[end] for _, end in spans), max))
        ends[-1] = before[-1]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def notes_on(texts: Sequence[Text], wanted: int) -> list[str]:
    notes = []
    joined = [text.joined for text in texts if text.joined > 1]
    if joined:
        notes.append(
            f"{len(joined)} of {len(texts)} documents are joined from whole shorter ones in order, "
            f"{sum(joined) / len(joined):.1f} each, as too few are long enough"
        )
    if len(texts) < wanted:
        notes.append(f"the text suffices for {len(texts)} documents of the {wanted} asked for")
    return notes
