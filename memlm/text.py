"""Text files, read piece by piece and refused by name when they are no text."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PIECE = 1 << 16


def check_text_file(path: str | os.PathLike[str]) -> Path:
    """Refuse a file that is missing, unreadable, empty or binary, before any of it is used."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"file {str(path)!r} is a folder; name the text files in it")
    if not path.exists():
        raise FileNotFoundError(f"file {str(path)!r} does not exist; check the path")
    for first in read_text(path):
        if first.strip():
            return path
    raise ValueError(f"file {str(path)!r} holds no text; give a file with something to read")


def read_text(
    path: str | os.PathLike[str], progress: Callable[[int], object] | None = None
) -> Iterator[str]:
    """Yield a UTF-8 file's text in pieces; `progress` is told the bytes of each.

    ValueError naming the file and the byte where it stops being text, PermissionError when it may not
    be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    try:
        with open(path, "rb") as file:
            while True:
                raw = file.read(PIECE)
                if b"\0" in raw:
                    raise ValueError(
                        f"file {str(path)!r} is binary (a zero byte at {read + raw.index(0)}); "
                        "give a text file"
                    )
                text = decoder.decode(raw, final=not raw)
                if text:
                    yield text
                if not raw:
                    return
                read += len(raw)
                if progress is not None:
                    progress(len(raw))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"file {str(path)!r} is not UTF-8 text (near byte {read + error.start}); convert it to UTF-8"
        ) from error
    except PermissionError as error:
        raise PermissionError(
            f"file {str(path)!r} may not be read; change its permissions"
        ) from error


def leading_tokens(tokenizer: Any) -> list[int]:
    """The special tokens a tokenizer puts in front of a document."""
    whole, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    at = next((i for i, token in enumerate(whole) if token == bare[0]), 0) if bare else 0
    return list(whole[:at])
