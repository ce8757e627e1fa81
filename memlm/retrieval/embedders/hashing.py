"""HashingEmbedder: bags of hashed words, without weights and without a corpus."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
import tokenize
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from memlm.files import write_atomically
from memlm.retrieval.codes import Precision
from memlm.retrieval.embedders.checks import checked_texts, text_batches
from memlm.retrieval.embedders.fingerprints import VERSION, digest

# Texts hashed together: their sums should stay in the processor's cache.
_TEXTS_AT_ONCE = 64
_WORDS_KNOWN = 1 << 17
# Words whose hashes agree share a count of documents: with 100,000 words about a third do, and in most
# cases one rare word is then taken for another.
_SLOTS = 1 << 18
# Sums of multiples of this are exact, whatever order the words come in.
_WEIGHT_UNIT = 2.0**-24
_FUNCTION_WORD_WEIGHT = 0.05

# Scripts written without blanks, of which every character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{1,64}}")
_ASCII_WORD = re.compile(r"[a-z0-9_]{1,64}")

# Words that every text is full of, and the words of questions: without a corpus to count in, this list
# stands for how little a word says.
FUNCTION_WORDS = frozenset(
    "a about above across after afterwards again against ago all almost along already also although "
    "always am among an and another any anybody anyone anything are aren around as ask asked at away "
    "back be became because become been before behind being below beside between both but by came can "
    "cannot come comes could couldn d did didn do does doesn doing don done down during each either "
    "else enough even ever every everyone everything few for from further gave get gets give go goes "
    "going gone got had hadn has hasn have haven having he her here hers herself him himself his how "
    "however i if in indeed into is isn it its itself just know known least less let like ll m made "
    "make makes many may maybe me might mine more most much must my myself near neither never next no "
    "nobody none nor not nothing now o of off often on once one only onto or other others our ours out "
    "over own per perhaps please put quite rather re really s said same saw say says see seem seemed "
    "shall she should shouldn since so some somebody someone something sometimes soon still such t take "
    "tell than that the their theirs them themselves then there therefore these they thing things this "
    "those though through thus to together told too took toward towards two under until up upon us use "
    "used ve very was wasn way we well went were weren what whatever when where whether which while who "
    "whole whom whose why will with within without won would wouldn yes yet you your yours yourself".split()
)


class HashingEmbedder:
    """Bags of words, each word a sum of `hashes` signed unit vectors out of `dim`, picked by its hash.

    Needs no weights and no corpus: equal words give equal vectors in every process, and nothing that is
    added later changes them. A word's count is damped to 1 + log(count); function words of English weigh a
    twentieth. `fit` weighs words by how rare they are in given texts instead, in any language.

    Words that collide move a cosine by about 1 / sqrt(dim) whatever `hashes` is. But with one hash that
    comes as a few complete false matches, which can hide a fact; with several, as small noise everywhere.
    Recall@1 / @5 of the chunk that answers "Where is NAME?", for 300 facts "NAME went to the PLACE." in
    1,023 chunks of 80 words of the Brown corpus, means of five draws, ties lost, dim 2048:
    hashes 1: .27 / .73, 4: .96 / 1.00, 8: 1.00 / 1.00, 12: 1.00 / 1.00, 12 and `fit`: .99 / 1.00.
    In 14,000 chunks 4: .75 / .95, 8: .96 / 1.00, 12: .99 / 1.00; with dim 4096 and 8: 1.00 / 1.00.
    Character n-grams beside the words gained .02 at most, for several times the work.

    Threads may share one; they wait for each other.
    """

    # How an index keeps the vectors, unless told otherwise.
    precision: ClassVar[Precision] = "ternary"

    def __init__(self, dim: int = 2048, hashes: int = 12) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim={dim!r} must be a whole number of at least 1")
        if isinstance(hashes, bool) or not isinstance(hashes, int) or not 1 <= hashes <= 15:
            raise ValueError(f"hashes={hashes!r} must be a whole number from 1 to 15")
        self.dim = dim
        self.hashes = hashes
        self._idf: NDArray[np.float32] | None = None
        self._words = _WordNumbers()
        self._lock = threading.Lock()
        self._forget_words()
        self.fingerprint = self._make_fingerprint()

    @classmethod
    def fit(cls, texts: Iterable[str], dim: int = 2048, hashes: int = 12) -> Self:
        """A new embedder that weighs every word by its inverse document frequency in `texts`.

        Reads lazily and keeps one megabyte of counts. ValueError when there is no text.
        """
        made = cls(dim, hashes)
        counts = np.zeros(_SLOTS, dtype=np.int64)
        total = 0
        for batch in text_batches(texts, _TEXTS_AT_ONCE):
            _, words, _ = made._word_counts(batch)
            counts += np.bincount(made._slots[words], minlength=_SLOTS)
            total += len(batch)
        if not total:
            raise ValueError("texts is empty; give the texts to count words in")
        # Both words of a slot may be in one text.
        counts = np.minimum(counts, total)
        made._set_idf(np.log1p((total - counts + 0.5) / (counts + 0.5)).astype(np.float32))
        return made

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row per text; zeros for a text without words."""
        texts = checked_texts(texts)
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = texts[begin : begin + _TEXTS_AT_ONCE]
            with self._lock:
                rows, words, counts = self._word_counts(batch)
                weights, buckets = self._values[words], self._buckets[words]
            # Whole numbers, so that the order of the words cannot affect the sums.
            values = np.rint(weights * (1.0 + np.log(counts))[:, None] / _WEIGHT_UNIT)
            places = rows[:, None] * self.dim + buckets
            sums = np.bincount(places.ravel(), values.ravel(), len(batch) * self.dim)
            sums = sums.reshape(len(batch), self.dim)
            norms = np.sqrt(np.square(sums).sum(axis=1, keepdims=True))
            np.divide(
                sums,
                np.where(norms > 0, norms, 1.0),
                out=vectors[begin : begin + len(batch)],
                casting="same_kind",
            )
        return vectors

    def encode_document(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same as `encode`."""
        return self.encode(texts)

    def encode_query(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same as `encode`: a question's words are searched for as they are."""
        return self.encode(texts)

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The older name of `encode_query`."""
        return self.encode_query(texts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and word weights into one .npz file, atomically."""
        settings = {"version": VERSION, "dim": self.dim, "hashes": self.hashes}
        arrays: dict[str, NDArray[Any]] = {
            "settings": np.frombuffer(json.dumps(settings).encode(), dtype=np.uint8)
        }
        if self._idf is not None:
            arrays["idf"] = self._idf

        def write(temporary: Path) -> None:
            # A name without .npz would be changed; an open file has none to change.
            with temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. ValueError naming a file that is damaged or something else."""
        try:
            # Before any of it is unpacked: a few bytes can stand for gigabytes of zeros.
            with zipfile.ZipFile(path) as packed:
                sizes = {entry.filename: entry.file_size for entry in packed.infolist()}
            if sum(sizes.values()) > 4 * _SLOTS + 4096:
                raise ValueError(f"it unpacks to {sum(sizes.values()):,} bytes")
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                settings = json.loads(file["settings"].tobytes())
                idf = file["idf"] if "idf" in file else None
            version, dim, hashes = settings["version"], settings["dim"], settings["hashes"]
        except FileNotFoundError:
            raise
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            EOFError,
            NotImplementedError,
            RuntimeError,
            SyntaxError,
            MemoryError,
            tokenize.TokenError,
            zlib.error,
            zipfile.BadZipFile,
        ) as error:
            raise ValueError(
                f"path={str(path)!r} is no HashingEmbedder or is damaged ({error}); give a file that "
                "HashingEmbedder.save wrote"
            ) from error
        if version != VERSION:
            raise ValueError(
                f"path={str(path)!r} has version {version!r}, this memlm reads {VERSION}; fit it again"
            )
        made = cls(dim, hashes)
        if idf is not None:
            if idf.shape != (_SLOTS,) or idf.dtype != np.float32 or not np.isfinite(idf).all():
                raise ValueError(f"path={str(path)!r} holds damaged word weights; fit it again")
            made._set_idf(idf)
        return made

    def _set_idf(self, idf: NDArray[np.float32]) -> None:
        self._idf = idf
        self._forget_words()
        self.fingerprint = self._make_fingerprint()

    def _make_fingerprint(self) -> str:
        if self._idf is None:
            weighed = " ".join([str(_FUNCTION_WORD_WEIGHT), *sorted(FUNCTION_WORDS)]).encode()
        else:
            weighed = self._idf.tobytes()
        weights = "idf" if self._idf is not None else "words"
        return f"hashing-{VERSION}:dim={self.dim}:hashes={self.hashes}:{weights}={digest(weighed)}"

    def _forget_words(self) -> None:
        self._words.clear()
        self._learned = 0
        self._buckets = np.zeros((1024, self.hashes), dtype=np.int64)
        self._values = np.zeros((1024, self.hashes), dtype=np.float64)
        self._slots = np.zeros(1024, dtype=np.int64)

    def _word_counts(
        self, texts: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Row, word and count of every different word of every text, each (m,)."""
        if len(self._words) > _WORDS_KNOWN:
            self._forget_words()
        found = [list(map(self._words.__getitem__, _words_of(text))) for text in texts]
        self._hash_new_words()
        lengths = np.array([len(words) for words in found])
        rows = np.repeat(np.arange(len(texts)), lengths)
        words = np.fromiter((word for each in found for word in each), np.int64, len(rows))
        many = max(1, len(self._words))
        keys, counts = np.unique(rows * many + words, return_counts=True)
        return keys // many, keys % many, counts

    def _hash_new_words(self) -> None:
        """Hash the words that were not known."""
        first, self._learned = self._learned, len(self._words)
        new = list(islice(reversed(self._words), self._learned - first))[::-1]
        if not new:
            return
        if self._learned > len(self._slots):
            # Twice the size, so that not every batch copies everything.
            self._buckets, self._values, self._slots = (
                np.concatenate(
                    [known, np.zeros((2 * self._learned, *known.shape[1:]), known.dtype)]
                )
                for known in (self._buckets, self._values, self._slots)
            )
        size = 4 * (self.hashes + 1)
        digests = b"".join(
            hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=size).digest()
            for word in new
        )
        numbers = np.frombuffer(digests, dtype="<u4").reshape(len(new), self.hashes + 1)
        slots = numbers[:, -1].astype(np.int64) % _SLOTS
        if self._idf is None:
            weights = np.array([_FUNCTION_WORD_WEIGHT if w in FUNCTION_WORDS else 1.0 for w in new])
        else:
            weights = self._idf[slots].astype(np.float64)
        here = slice(first, self._learned)
        # The lowest bit is the sign, the others are the place.
        signs = 1.0 - 2.0 * (numbers[:, :-1] & 1)
        self._values[here] = signs * (weights / math.sqrt(self.hashes))[:, None]
        self._buckets[here] = (numbers[:, :-1] >> 1) % self.dim
        self._slots[here] = slots


class _WordNumbers(dict[str, int]):
    """The number of every word: the next one free for a word not asked for before."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def _words_of(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())
