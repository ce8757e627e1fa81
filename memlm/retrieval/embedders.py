"""Embedders: texts to vectors by hashing alone, by any Hugging Face model, or by a sentence-transformer.

All give float32 of length 1, so that a product of vectors is a cosine; a text without a word or token
gives zeros. A row depends on its own text only, whatever else is embedded with it or was before.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import threading
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

# Part of every fingerprint; to be raised when the same settings give other vectors.
VERSION = 1
# Texts hashed together: their sums should stay in the processor's cache.
_TEXTS_AT_ONCE = 64
_WORDS_KNOWN = 1 << 17
# Words share a count of documents where their hashes agree: with 100,000 words about a third do, and
# for most of them that is one rare word taken for another.
_SLOTS = 1 << 18
# Sums of multiples of this are exact, whatever order the words come in.
_UNIT = 2.0**-24
_FUNCTION_WORD_WEIGHT = 0.05

# Scripts written without blanks: every character counts as a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]{{1,64}}")
_ASCII_WORD = re.compile(r"[a-z0-9_]{1,64}")

# What every text is full of, and the words of questions: without a corpus to count in, this is what is
# known of how little a word tells.
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
    added later changes them. A word's count is damped to 1 + log; function words of English weigh a
    twentieth. `fit` weighs words by how rare they are in given texts instead, in any language.

    Words that collide move a cosine by about 1 / sqrt(dim) whatever `hashes`; but one hash makes that a
    few whole false matches, several make it small noise everywhere, and only the former hide a fact.
    Recall@1 / @5 of the chunk that answers "Where is NAME?", for 300 facts "NAME went to the PLACE." in
    1,023 chunks of 80 words of the Brown corpus, means of five draws, ties lost, dim 2048:
    hashes 1: .27 / .73, 4: .96 / 1.00, 8: 1.00 / 1.00, 12: 1.00 / 1.00, 12 and `fit`: .99 / 1.00.
    In 14,000 chunks 4: .75 / .95, 8: .96 / 1.00, 12: .99 / 1.00; with dim 4096 and 8: 1.00 / 1.00.
    Character n-grams beside the words gained .02 at most, for several times the work.

    Threads may share one; they wait for each other.
    """

    def __init__(self, dim: int = 2048, hashes: int = 12) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim={dim!r} must be a whole number of at least 1")
        if isinstance(hashes, bool) or not isinstance(hashes, int) or not 1 <= hashes <= 15:
            raise ValueError(f"hashes={hashes!r} must be a whole number from 1 to 15")
        self.dim = dim
        self.hashes = hashes
        self._idf: NDArray[np.float32] | None = None
        self._words = _Numbers()
        self._lock = threading.Lock()
        self._forget()
        self.fingerprint = self._describe()

    @classmethod
    def fit(cls, texts: Iterable[str], dim: int = 2048, hashes: int = 12) -> Self:
        """A new embedder that weighs every word by its inverse document frequency in `texts`.

        Reads lazily and keeps one megabyte of counts. ValueError when there is no text.
        """
        made = cls(dim, hashes)
        counts = np.zeros(_SLOTS, dtype=np.int64)
        total = 0
        for batch in _batches(texts, _TEXTS_AT_ONCE):
            _, words, _ = made._count(batch)
            counts += np.bincount(made._slots[words], minlength=_SLOTS)
            total += len(batch)
        if not total:
            raise ValueError("texts is empty; give the texts to count words in")
        # Two words of one slot may both be in a text.
        counts = np.minimum(counts, total)
        made._weigh(np.log1p((total - counts + 0.5) / (counts + 0.5)).astype(np.float32))
        return made

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row a text; zeros for a text without words."""
        texts = _checked_texts(texts)
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for begin in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = texts[begin : begin + _TEXTS_AT_ONCE]
            with self._lock:
                rows, words, counts = self._count(batch)
                weights, buckets = self._values[words], self._buckets[words]
            # Whole numbers, so that the order of the words cannot show in the sums.
            values = np.rint(weights * (1.0 + np.log(counts))[:, None] / _UNIT)
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

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same as `encode`: a question's words are looked for as they are."""
        return self.encode(texts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings and word weights into one .npz file, atomically."""
        from memlm.files import write_atomically

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
            made._weigh(idf)
        return made

    def _weigh(self, idf: NDArray[np.float32]) -> None:
        self._idf = idf
        self._forget()
        self.fingerprint = self._describe()

    def _describe(self) -> str:
        if self._idf is None:
            told = " ".join([str(_FUNCTION_WORD_WEIGHT), *sorted(FUNCTION_WORDS)]).encode()
        else:
            told = self._idf.tobytes()
        weights = "idf" if self._idf is not None else "words"
        return f"hashing-{VERSION}:dim={self.dim}:hashes={self.hashes}:{weights}={_digest(told)}"

    def _forget(self) -> None:
        self._words.clear()
        self._learned = 0
        self._buckets = np.zeros((1024, self.hashes), dtype=np.int64)
        self._values = np.zeros((1024, self.hashes), dtype=np.float64)
        self._slots = np.zeros(1024, dtype=np.int64)

    def _count(
        self, texts: Sequence[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Row, word and count of every different word of every text, each (m,)."""
        if len(self._words) > _WORDS_KNOWN:
            self._forget()
        found = [list(map(self._words.__getitem__, _words_of(text))) for text in texts]
        self._learn()
        lengths = np.array([len(words) for words in found])
        rows = np.repeat(np.arange(len(texts)), lengths)
        words = np.fromiter((word for each in found for word in each), np.int64, len(rows))
        many = max(1, len(self._words))
        keys, counts = np.unique(rows * many + words, return_counts=True)
        return keys // many, keys % many, counts

    def _learn(self) -> None:
        """Hash the words that were not known."""
        first, self._learned = self._learned, len(self._words)
        new = list(islice(reversed(self._words), self._learned - first))[::-1]
        if not new:
            return
        if self._learned > len(self._slots):
            # To twice the size, so that not every batch copies everything.
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


class ModelEmbedder:
    """Pooled hidden states of a Hugging Face model: an encoder, a causal language model, a MemLM's base.

    model: a live model, used where it is and as it is; one with a `base` (MemLMForCausalLM) stands for
    its base. layer: which hidden states, 0 the embeddings and -1 the last, or "middle". pooling: "mean"
    over a text's tokens, special ones included, or its "last" token. max_length: tokens of a text that
    are read, from its beginning (or as `tokenizer.truncation_side` says); by default 512, less where
    model or tokenizer end before. center: (dim,) vector subtracted before the length is made 1.

    Causal models put all texts close together: centre them with `fit`. The fingerprint is that of the
    model when the embedder is made: after training it, make another.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layer: int | Literal["middle"] = -1,
        pooling: Literal["mean", "last"] = "mean",
        batch_size: int = 32,
        max_length: int | None = None,
        center: NDArray[np.float32] | None = None,
    ) -> None:
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling={pooling!r} is not known; use 'mean' or 'last'")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model = _backbone(model)
        self.tokenizer = tokenizer
        config = self.model.config.get_text_config()
        layers = int(config.num_hidden_layers)
        if layer == "middle":
            layer = (layers + 1) // 2
        elif (
            isinstance(layer, bool)
            or not isinstance(layer, int)
            or not -layers - 1 <= layer <= layers
        ):
            raise ValueError(
                f"layer={layer!r} does not exist; use 'middle', or from 0, the embeddings, to {layers}"
            )
        self.layer = layer % (layers + 1)
        self._is_last = self.layer == layers
        self.pooling = pooling
        self.batch_size = batch_size
        self.dim = int(config.hidden_size)
        limits = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        most = min(int(limit) for limit in limits if limit is not None and limit > 0)
        if max_length is None:
            max_length = min(512, most)
        if not 1 <= max_length <= most:
            raise ValueError(
                f"max_length={max_length} must be from 1 to {most}, the model's own limit"
            )
        self.max_length = max_length
        if center is not None:
            center = _checked(np.asarray(center, dtype=np.float32)[None], 1, self.dim, "center")[0]
        self.center = center
        self.fingerprint = self._describe()

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **settings: Any) -> Self:
        """Load model and tokenizer of a hub id or a folder; `settings` are those of the class."""
        from transformers import AutoModel, AutoTokenizer

        return cls(AutoModel.from_pretrained(name), AutoTokenizer.from_pretrained(name), **settings)

    def fit(self, texts: Iterable[str]) -> ModelEmbedder:
        """A new embedder, of the same model, centred at the mean of `texts`. ValueError without any."""
        total = np.zeros(self.dim, dtype=np.float64)
        count = 0
        for batch in _batches(texts, 8 * self.batch_size):
            pooled, some = self._pool(batch)
            total += pooled[some].sum(axis=0, dtype=np.float64)
            count += int(some.sum())
        if not count:
            raise ValueError("texts is empty or holds no token; give texts of the kind to embed")
        center = (total / count).astype(np.float32)
        return ModelEmbedder(
            self.model,
            self.tokenizer,
            self.layer,
            self.pooling,
            self.batch_size,
            self.max_length,
            center,
        )

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row a text; zeros for a text without tokens."""
        texts = _checked_texts(texts)
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        for begin in range(0, len(texts), 8 * self.batch_size):
            pooled, some = self._pool(texts[begin : begin + 8 * self.batch_size])
            if self.center is not None:
                pooled = pooled - self.center
            vectors[begin : begin + len(pooled)] = np.where(some[:, None], _unit(pooled), 0.0)
        return _checked(vectors, len(texts), self.dim, "ModelEmbedder")

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The same as `encode`."""
        return self.encode(texts)

    def _pool(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Pooled states (n, dim), and which texts have tokens (n,)."""
        import torch

        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        ids: list[list[int]] = encoded["input_ids"]
        pooled = np.zeros((len(ids), self.dim), dtype=np.float32)
        some = np.array([bool(row) for row in ids], dtype=np.bool_)
        # Texts of about one length go together, and little is padding.
        order = sorted(np.flatnonzero(some).tolist(), key=lambda i: len(ids[i]))
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                for begin in range(0, len(order), self.batch_size):
                    rows = order[begin : begin + self.batch_size]
                    pooled[rows] = self._forward([ids[row] for row in rows])
        finally:
            for module, mode in modes:
                module.training = mode
        return pooled, some

    def _forward(self, ids: list[list[int]]) -> NDArray[np.float32]:
        import torch

        device = next(self.model.parameters()).device
        longest = max(map(len, ids))
        pad = self.tokenizer.pad_token_id or 0
        # On the right, whatever the tokenizer's side: positions count from the left.
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=device)
        lengths = torch.tensor([len(row) for row in ids], device=device)
        mask = torch.arange(longest, device=device) < lengths[:, None]
        settings: dict[str, Any] = {"output_hidden_states": not self._is_last}
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            settings["use_cache"] = False
        out = self.model(input_ids=padded, attention_mask=mask.long(), **settings)
        states = out.last_hidden_state if self._is_last else out.hidden_states[self.layer]
        states = states.float()
        if self.pooling == "last":
            chosen = states[torch.arange(len(ids), device=device), lengths - 1]
        else:
            # Not a product with the mask: padding may hold anything, infinity too.
            chosen = states.masked_fill(~mask[:, :, None], 0).sum(1) / lengths[:, None]
        return _checked(chosen.cpu().numpy(), len(ids), self.dim, "ModelEmbedder")

    def _describe(self) -> str:
        config = self.model.config.to_dict()
        # These say where a model came from, or what the parameters say themselves.
        for name in ("_name_or_path", "architectures", "transformers_version", "dtype"):
            config.pop(name, None)
        tokenizer = self.tokenizer
        told = {
            "config": config,
            "parameters": _parameters(self.model),
            "layer": self.layer,
            "pooling": self.pooling,
            "max_length": self.max_length,
            "center": None if self.center is None else _digest(self.center.tobytes()),
            "tokenizer": [len(tokenizer), tokenizer.truncation_side, tokenizer(_PROBE).input_ids],
        }
        text = json.dumps(told, sort_keys=True, default=str)
        return f"model-{VERSION}:{config.get('model_type')}:dim={self.dim}:{_digest(text.encode())}"


class SentenceTransformerEmbedder:
    """A sentence-transformers model, by hub id or folder, or a live one.

    Queries and documents go through the model's own `encode_query` and `encode_document`, which know its
    prompts; `query_prompt` and `document_prompt` are put in front of the texts instead where they are
    given. Needs the extra: pip install "memlm[sentence-transformers]".
    """

    def __init__(
        self,
        model: Any,
        query_prompt: str | None = None,
        document_prompt: str | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if isinstance(model, (str, os.PathLike)):
            model = _sentence_transformer(os.fspath(model), device)
        elif device is not None:
            raise ValueError(
                f"device={device!r} is for a model given by name; move a live one yourself"
            )
        if not hasattr(model, "encode") or not hasattr(model, "named_parameters"):
            raise ValueError(
                f"model is a {type(model).__name__}; give a SentenceTransformer, or its hub id or folder"
            )
        self.model = model
        self.query_prompt = query_prompt
        self.document_prompt = document_prompt
        self.batch_size = batch_size
        self.dim = int(np.asarray(model.encode(["a"])).shape[1])
        told = {
            # Its modules with their settings: pooling has no parameters.
            "modules": repr(model),
            "parameters": _parameters(model),
            "prompts": [query_prompt, document_prompt, getattr(model, "prompts", None)],
            "max_length": getattr(model, "max_seq_length", None),
        }
        text = json.dumps(told, sort_keys=True, default=str)
        self.fingerprint = (
            f"sentence-transformers-{VERSION}:dim={self.dim}:{_digest(text.encode())}"
        )

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row a document."""
        return self._encode(texts, "encode_document", self.document_prompt, ("document", "passage"))

    def encode_queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, dim) float32, one row a query."""
        return self._encode(texts, "encode_query", self.query_prompt, ("query",))

    def _encode(
        self, texts: Sequence[str], method: str, prompt: str | None, names: tuple[str, ...]
    ) -> NDArray[np.float32]:
        texts = _checked_texts(texts)
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        settings: dict[str, Any] = {}
        encode = self.model.encode
        if prompt is not None:
            settings["prompt"] = prompt
        elif hasattr(self.model, method):
            encode = getattr(self.model, method)
        else:
            known = getattr(self.model, "prompts", None) or {}
            settings["prompt"] = next((known[name] for name in names if known.get(name)), None)
        found = encode(
            texts,
            batch_size=self.batch_size,
            convert_to_numpy=True,
            show_progress_bar=False,
            **settings,
        )
        vectors = _checked(
            np.asarray(found, dtype=np.float32), len(texts), self.dim, "SentenceTransformerEmbedder"
        )
        return _unit(vectors)


# Letters, digits, signs and a line break: tokenizers that differ, differ here.
_PROBE = "It's 3.5 miles, he said - naïve café.\n\nMary went to the office."


class _Numbers(dict[str, int]):
    """Words numbered as they are asked for."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


def _words_of(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts")
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield _checked_texts(batch)


def _checked_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts")
    texts = list(texts)
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts[{at}] is a {type(text).__name__}; give strings")
    return texts


def _checked(vectors: NDArray[Any], n: int, dim: int, name: str) -> NDArray[np.float32]:
    """Refuse what are not `n` finite float32 vectors of width `dim`, by the embedder's name."""
    if vectors.shape != (n, dim) or vectors.dtype != np.float32:
        raise ValueError(
            f"{name} gave {vectors.dtype} of shape {vectors.shape}, not float32 of ({n}, {dim}); "
            "use another model or layer"
        )
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"{name} gave values that are not finite; run the model in float32 or bfloat16"
        )
    return vectors


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1.0)).astype(np.float32, copy=False)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _parameters(module: Any) -> str:
    """A digest of every parameter's name, shape, type and a few of its values."""
    import torch

    told = hashlib.blake2b(digest_size=8)
    for name, value in module.named_parameters():
        told.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().reshape(-1)
        if len(flat):
            places = torch.linspace(0, len(flat) - 1, min(16, len(flat))).long().to(flat.device)
            told.update(flat[places].float().cpu().numpy().tobytes())
    return told.hexdigest()


def _backbone(model: Any) -> Any:
    """The part of a model that gives hidden states, without a memory around it or a head on it."""
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}; give a live model, or use "
            "ModelEmbedder.from_pretrained(name)"
        )
    if isinstance(getattr(model, "base", None), nn.Module):
        model = model.base
    if hasattr(model, "get_base_model"):
        # peft's: adapters are part of the model inside.
        model = model.get_base_model()
    if getattr(model.config, "is_encoder_decoder", False):
        return model.get_encoder()
    return getattr(model, "base_model", model)


def _sentence_transformer(name: str, device: str | None) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "SentenceTransformerEmbedder needs sentence-transformers: "
            'pip install "memlm[sentence-transformers]"'
        ) from error
    return SentenceTransformer(name, device=device)
