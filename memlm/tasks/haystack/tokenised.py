"""Sentences as tokens: a form of noise that is cheap to cut."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from memlm.tasks.haystack.documents import Document
from memlm.tokens import encode_texts, encode_with_spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# BABILong's own filter: shorter ones are headings, page numbers and exclamations.
MIN_TOKENS = 10
SENTENCES_AT_ONCE = 1_000
_MEMO_LIMIT = 50_000


class SentenceTexts(Sequence[str]):
    """Sentences kept as one array of UTF-8 bytes, each decoded when asked for.

    text (bytes,) uint8; offsets (sentences + 1,) int64.
    """

    def __init__(self, text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self._text = text
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        number = at + len(self) if at < 0 else at
        if not 0 <= number < len(self):
            raise IndexError(f"sentence {at} of {len(self)}")
        return bytes(self._text[self._offsets[number] : self._offsets[number + 1]]).decode()


class TokenHaystack:
    """The sentences of a haystack as one flat array of token ids.

    Each sentence is tokenised by itself after one space, so a composed document is the
    concatenation of its sentences' ids; for byte-level BPE that equals tokenising the joined text.
    Sentences under `min_tokens` tokens are left out.

    ids (tokens,) int32; offsets (sentences + 1,) where sentences start in ids; first_sentence
    (documents + 1,) where documents start among the sentences. With `in_order` noise starts at the
    first sentence and starts over at the end, else at random documents and sentences.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        min_tokens: int = MIN_TOKENS,
        in_order: bool = False,
    ) -> None:
        texts: list[str] = []
        pieces: list[NDArray[np.int32]] = []
        lengths: list[NDArray[np.int64]] = []
        first_sentence = [0]
        for kept, ids, sizes in tokenise(documents, tokenizer, source, min_tokens):
            texts += kept
            pieces.append(ids)
            lengths.append(sizes)
            first_sentence.append(len(texts))
        self._set(
            tokenizer,
            source,
            min_tokens,
            in_order,
            texts,
            np.concatenate(pieces),
            np.concatenate([[0], np.cumsum(np.concatenate(lengths))]),
            np.array(first_sentence, dtype=np.int64),
        )

    @classmethod
    def of_arrays(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        min_tokens: int,
        texts: Sequence[str],
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        first_sentence: NDArray[np.int64],
    ) -> TokenHaystack:
        """Make a haystack from the arrays of another one, which may be mapped files."""
        made = cls.__new__(cls)
        made._set(tokenizer, source, min_tokens, False, texts, ids, offsets, first_sentence)
        return made

    def _set(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        min_tokens: int,
        in_order: bool,
        texts: Sequence[str],
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        first_sentence: NDArray[np.int64],
    ) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.min_tokens = min_tokens
        self.in_order = in_order
        self.texts = texts
        self.ids = ids
        self.offsets = offsets
        self.first_sentence = first_sentence
        self._memo: dict[str, NDArray[np.int32]] = {}

    @functools.cached_property
    def digest(self) -> str:
        """A short fingerprint of the token ids: same source, split and tokenizer, same digest."""
        return hashlib.blake2b(np.ascontiguousarray(self.ids).data, digest_size=8).hexdigest()

    def encode(self, text: str) -> NDArray[np.int32]:
        """Tokenise a short text as it stands, and remember the result: there are few different facts."""
        known = self._memo.get(text)
        if known is None:
            if len(self._memo) >= _MEMO_LIMIT:
                self._memo.clear()
            known = np.array(encode_texts(self.tokenizer, [text])[0], dtype=np.int32)
            self._memo[text] = known
        return known

    def cut_text(self, sentence: int, tokens: int) -> str:
        """Return the text of a sentence's first `tokens` tokens, with its leading space."""
        text = f" {self.texts[sentence]}"
        if tokens == 0:
            return ""
        spans = encode_with_spans(self.tokenizer, [text])[1][0]
        if spans is None:
            start = self.offsets[sentence]
            cut = self.ids[start : start + tokens].tolist()
            # Some decoders drop the leading space.
            return f" {self.tokenizer.decode(cut).removeprefix(' ')}"
        return text[: spans[tokens - 1][1]]

    @functools.cached_property
    def characters(self) -> NDArray[np.int64]:
        """(sentences + 1,) where sentences start in their joined text, each ended by one blank."""
        sizes = np.fromiter((len(text) + 1 for text in self.texts), np.int64, len(self.texts))
        return np.concatenate([[0], np.cumsum(sizes)])

    def runs(
        self, budget: int, rng: np.random.Generator, window: int | None = None
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Draw stretches of sentences until they hold `budget` tokens.

        Returns the first sentence of each stretch and the sentence after its last, both (runs,).
        window: as in the published sampler, a stretch is the whole sentences within this many characters
        from a random character of a random document on, without sentences cut at either end and without
        the document's last one. None: from a random sentence of a random document to its end. A haystack
        used in order draws no stretches, and takes no window.
        """
        firsts: list[NDArray[Any]] = []
        ends: list[NDArray[Any]] = []
        held = 0
        while held < budget:
            # Many at a time: a document of 50M tokens takes tens of thousands of stretches.
            mean = len(self.ids) / (len(self.first_sentence) - 1)
            count = int((budget - held) / mean) + 16
            if self.in_order:
                document = np.zeros(count, dtype=np.int64)
                start = np.zeros(count)
            else:
                document = rng.integers(0, len(self.first_sentence) - 1, count)
                start = rng.random(count)
            begin, end = self.first_sentence[document], self.first_sentence[document + 1]
            if window is None or self.in_order:
                first = begin + (start * (end - begin)).astype(np.int64)
            else:
                first, end = self._within(begin, end, start, window)
                # If no sentence is short enough, the published sampler would draw forever.
                window = window if len(first) else 2 * window
            firsts.append(first)
            ends.append(end)
            held += int((self.offsets[end] - self.offsets[first]).sum())
        if not firsts:
            empty = np.zeros(0, dtype=np.int64)
            return empty, empty
        return np.concatenate(firsts), np.concatenate(ends)

    def _within(
        self, begin: NDArray[Any], end: NDArray[Any], start: NDArray[Any], window: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Sentences wholly inside a window of characters that opens at the share `start` of each
        document, (draws,) to (runs,): draws without such a sentence are left out."""
        opens, closes = self.characters[begin], self.characters[end] - 1
        at = opens + (start * (closes - opens)).astype(np.int64)
        # A blank at the start belongs to the next sentence, a blank at the end to the last one.
        first = np.searchsorted(self.characters, at + 1, side="right")
        stop = np.minimum(at + window, closes) - 1
        last = np.searchsorted(self.characters, stop, side="right") - 1
        some = last > first
        return first[some], last[some]


def tokenise(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    min_tokens: int = MIN_TOKENS,
) -> Iterator[tuple[list[str], NDArray[np.int32], NDArray[np.int64]]]:
    """Yield for every document its sentences of `min_tokens`, their ids joined, and their lengths.

    Documents left without a sentence are skipped; ValueError when all are.
    """
    if min_tokens < 1:
        raise ValueError(f"min_tokens={min_tokens} must be at least 1")
    found = False
    for document in documents:
        texts: list[str] = []
        lengths: list[int] = []
        pieces: list[NDArray[np.int32]] = []
        # A tokenizer's record of a text is many times the size of the text: never a whole book at once.
        for begin in range(0, len(document.sentences), SENTENCES_AT_ONCE):
            batch = document.sentences[begin : begin + SENTENCES_AT_ONCE]
            encoded = encode_texts(tokenizer, [f" {sentence}" for sentence in batch])
            kept = [
                (text, ids)
                for text, ids in zip(batch, encoded, strict=True)
                if len(ids) >= min_tokens
            ]
            texts += [text for text, _ in kept]
            lengths += [len(ids) for _, ids in kept]
            pieces.append(np.fromiter(itertools.chain(*(ids for _, ids in kept)), dtype=np.int32))
        if texts:
            found = True
            yield texts, np.concatenate(pieces), np.array(lengths, dtype=np.int64)
    if not found:
        raise ValueError(
            f"haystack {source!r} has no sentence of {min_tokens} tokens; "
            "give a source with longer sentences"
        )


def from_sentences(
    sentences: Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> TokenHaystack:
    """Make a haystack of the given sentences, used in order and as they are.

    Takes from an iterable no more sentences than `tokens` need, so it may be endless.
    """
    taken: list[str] = []
    held = 0
    pending = iter(sentences)
    while held < tokens or not taken:
        batch = [text.strip() for text in itertools.islice(pending, 256)]
        if not batch:
            break
        taken += batch
        held += sum(map(len, encode_texts(tokenizer, [f" {text}" for text in batch])))
    if not taken:
        raise ValueError("haystack is an empty list of sentences; give at least one sentence")
    return TokenHaystack([Document("given", taken)], tokenizer, "given", 1, in_order=True)
