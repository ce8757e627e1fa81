"""Plain documents for language modelling: one per row, never packed together, long ones over many batches.

A document longer than a stage's segments continues in the next batch with its memory carried along; every
token but the first is a target, at the borders of pieces too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memlm.segment import IGNORE
from memlm.tasks.haystack.sources import (
    CARRIED,
    Split,
    open_dataset,
    parse_hub,
    read_documents,
    text_column,
)
from memlm.text import read_text
from memlm.tokens import encode_texts
from memlm.train.curriculum import Stage
from memlm.train.data import Piece, shifted

Texts = Sequence[tuple[str, str]] | Iterable[tuple[str, str]]
_NO_TEXT = "texts holds no document with text in it; give at least one"


class DocumentSource:
    """Texts as training documents, each closed by the tokenizer's end token.

    texts: a sequence of (name, text), shuffled anew every epoch, or an iterable of such pairs, read in
    order and started over at its end. skip_empty: skip documents without text instead of refusing
    them. split_special_tokens: control tokens written out in a text are text; False makes them control
    tokens.
    """

    def __init__(
        self,
        texts: Texts,
        tokenizer: Any,
        segment_length: int,
        seed: int = 0,
        skip_empty: bool = False,
        split_special_tokens: bool = True,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token")
        if isinstance(texts, Sequence) and not texts:
            raise ValueError("texts is empty; give at least one document")
        if isinstance(texts, Sequence) and skip_empty:
            texts = _with_text(texts)
        self.texts = texts
        self.tokenizer = tokenizer
        self.segment_length = segment_length
        self.seed = seed
        self.skip_empty = skip_empty
        self.split_special_tokens = split_special_tokens
        self._order: tuple[int, np.ndarray] | None = None
        self._stream: Iterator[tuple[str, str]] | None = None
        self._read = 0

    def __getstate__(self) -> dict[str, Any]:
        # A spawned data worker is sent the texts, and reads them from their start by itself.
        return {**self.__dict__, "_stream": None, "_read": 0}

    def single_piece(self, stages: Sequence[Stage]) -> bool:
        """No: a document has as many pieces as it needs."""
        return False

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        """Document `ordinal`, cut into as many segments per piece as `stage` draws."""
        ids = self._encode(*self._text(ordinal))
        rng = np.random.default_rng([self.seed, ordinal])
        yield from cut_pieces(ids, shifted(ids), self.segment_length, stage, rng)

    def whole(self, limit: int) -> list[Piece]:
        """The first `limit` documents in their order, each in one piece, to evaluate on."""
        pieces: list[Piece] = []
        for name, text in self.texts:
            if self.skip_empty and not text.strip():
                continue
            ids = self._encode(name, text)
            pieces.append(Piece(ids, shifted(ids)))
            if len(pieces) == limit:
                break
        if not pieces:
            raise ValueError(_NO_TEXT)
        return pieces

    def _encode(self, name: str, text: str) -> np.ndarray:
        if not text.strip():
            raise ValueError(
                f"document {name!r} is empty; remove it, or set skip_empty to skip such documents"
            )
        ids = encode_texts(self.tokenizer, [text], self.split_special_tokens)[0]
        return np.array([*ids, self.tokenizer.eos_token_id], dtype=np.int64)

    def _text(self, ordinal: int) -> tuple[str, str]:
        if not isinstance(self.texts, Sequence):
            return self._streamed(ordinal)
        epoch, index = divmod(ordinal, len(self.texts))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.texts))
            self._order = epoch, order
        return self.texts[int(self._order[1][index])]

    def _streamed(self, ordinal: int) -> tuple[str, str]:
        if self._stream is None or ordinal < self._read:
            self._stream, self._read = self._endless(), 0
        while True:
            found = next(self._stream)
            self._read += 1
            if self._read > ordinal:
                return found

    def _endless(self) -> Iterator[tuple[str, str]]:
        while True:
            found = False
            for name, text in self.texts:
                if text.strip() or not self.skip_empty:
                    found = True
                    yield name, text
            if not found:
                raise ValueError(_NO_TEXT)


def cut_pieces(
    ids: np.ndarray, targets: np.ndarray, length: int, stage: Stage, rng: np.random.Generator
) -> Iterator[Piece]:
    """A document in pieces of as many segments of `length` tokens as `stage` draws.

    A piece without a target joins the next one; what follows the last target is dropped.
    """
    aimed = np.flatnonzero(targets != IGNORE)
    if not len(aimed):
        yield Piece(ids[:length], targets[:length])
    begin = end = 0
    while len(aimed) and begin <= aimed[-1]:
        segments = int(rng.integers(stage.min_segments, stage.max_segments + 1))
        end += segments * length
        if (targets[begin:end] != IGNORE).any():
            yield Piece(ids[begin:end], targets[begin:end])
            begin = end


class TextFiles(Sequence[tuple[str, str]]):
    """The UTF-8 text files of a folder, or one file: (name, text), read when asked for.

    skip_empty: leave out files without text, for which each file is read up to its first letter; otherwise
    a file of zero bytes is refused.
    """

    def __init__(self, path: str | os.PathLike[str], skip_empty: bool = False) -> None:
        self.path = root = Path(path)
        if not root.exists():
            raise FileNotFoundError(f"path {str(root)!r} does not exist; name a file or a folder")
        if not root.is_dir() and not root.is_file():
            raise ValueError(
                f"path {str(root)!r} is a pipe or a device, and documents are read again and again; write "
                "its text to a file"
            )
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        self.files = [p for p in files if not p.name.startswith(".")]
        if not self.files:
            raise ValueError(f"folder {str(root)!r} holds no file; give a folder of text files")
        self.skip_empty = skip_empty
        if skip_empty:
            self.files = [file for file in self.files if any(map(str.strip, read_text(file)))]
            if not self.files:
                raise ValueError(_NO_TEXT)
        empty = [str(file) for file in self.files if file.stat().st_size == 0]
        if empty:
            raise ValueError(f"document {empty[0]!r} is empty; remove it")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        file = self.files[index]
        return str(file), "".join(read_text(file))


def _with_text(texts: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """Those of `texts` that hold text; `TextFiles` as they are, since they were checked when listed."""
    if isinstance(texts, TextFiles):
        return texts if texts.skip_empty else TextFiles(texts.path, skip_empty=True)
    found = [(name, text) for name, text in texts if text.strip()]
    if not found:
        raise ValueError(_NO_TEXT)
    return found


class DatasetTexts:
    """The text column of a `datasets` data set, streamed or not, as (name, text)."""

    def __init__(self, rows: Iterable[dict[str, Any]], column: str | None = None) -> None:
        self.rows = rows
        self.column = column

    def __iter__(self) -> Iterator[tuple[str, str]]:
        column = self.column
        for number, row in enumerate(self.rows):
            column = column or text_column("the data set", row)
            if column not in row:
                raise ValueError(
                    f"the data set has no column {column!r}; its columns are {', '.join(row)}"
                )
            yield f"row {number}", str(row[column] or "")


def open_texts(path: str, skip_empty: bool = False, split: Split = "train") -> Texts:
    """A text file, a folder of them, what the haystack "builtin" or "installed" has for `split`, or
    "hub:ID[@CONFIG][:COLUMN]" streamed through `datasets`.

    skip_empty: of a folder's files, leave out those without text. ValueError for a data set of the hub
    that has no split for evaluation.
    """
    if path in CARRIED:
        return [(text.name, " ".join(text.sentences)) for text in read_documents(path, split)]
    if not path.startswith("hub:"):
        return TextFiles(path, skip_empty)
    name, config, column = parse_hub(path)
    splits = open_dataset(path, name, config)
    if split == "eval":
        held_out = [part for part in ("validation", "test") if part in splits]
        if not held_out:
            raise ValueError(
                f"{path!r} has no split 'validation' or 'test' but {', '.join(splits)}; name other data "
                "to evaluate on"
            )
        return DatasetTexts(splits[held_out[0]], column)
    return DatasetTexts(splits["train" if "train" in splits else next(iter(splits))], column)
