"""Text files, read piece by piece and refused by name when they are not text; and where sentences end."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

PIECE = 1 << 16
# Text without full stops is cut here, so that facts find gaps in it.
MAX_SENTENCE_CHARACTERS = 2_000

LIST_ITEM = re.compile(r"(?:[*+\-\u2022]|\d+\.)")
_PARAGRAPH = re.compile(rf"\n\s*\n|\n\s*{LIST_ITEM.pattern}\s+")
_BOUNDARY = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]*[A-Z0-9])")
_ENDINGS = frozenset(".!?\"'\u201d\u2019)]")
_LAST_WORD = re.compile(r"([\w.]+)$")
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof rev gen col capt lt sgt hon st jr sr vs etc e.g i.e cf al fig vol pp p "
    "inc ltd co corp dept approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)


def check_text_file(path: str | os.PathLike[str]) -> Path:
    """Refuse a file that is missing, unreadable, empty or binary, before any of it is used.

    Of a pipe or a device, which can be read once only, nothing is known before that.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"file {str(path)!r} is a folder; name the text files in it")
    if not path.exists():
        hint = "give /dev/stdin for standard input" if str(path) == "-" else "check the path"
        raise FileNotFoundError(f"file {str(path)!r} does not exist; {hint}")
    if not path.is_file():
        # What comes through a pipe can be read but once: by whom it is meant for.
        return path
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


def check_characters(name: str, text: str) -> None:
    """Refuse text that holds half a character, as undecoded bytes and broken escapes leave them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {text[error.start]!r} at {error.start}, half a character that no tokenizer takes; "
            "decode it with errors='replace'"
        ) from error


def split_sentences(text: str) -> list[str]:
    """Cut text into sentences by rule; blank lines and list items always end one."""
    sentences = []
    for paragraph in _PARAGRAPH.split(text):
        flat = " ".join(paragraph.split())
        start = 0
        for boundary in _BOUNDARY.finditer(flat):
            if flat[boundary.start()] == "." and _is_abbreviation(flat[start : boundary.start()]):
                continue
            sentences.append(flat[start : boundary.end()].rstrip())
            start = boundary.end()
        if start < len(flat):
            sentences.append(flat[start:])
    return [piece for sentence in sentences for piece in _cut_long(sentence)]


def ends_sentence(word: str, following: str) -> bool:
    """Whether a sentence ends between two neighbouring words of a paragraph: `split_sentences`' rule."""
    # Most words end in a letter, and a pattern takes its time.
    if word[-1] not in _ENDINGS:
        return False
    boundary = _BOUNDARY.search(f"{word} {following}")
    if boundary is None:
        return False
    return word[boundary.start()] != "." or not _is_abbreviation(word[: boundary.start()])


def _is_abbreviation(before: str) -> bool:
    word = _LAST_WORD.search(before)
    if word is None:
        return False
    last = word.group(1)
    return last.lower() in _ABBREVIATIONS or (len(last) == 1 and last.isupper())


def _cut_long(sentence: str) -> Iterator[str]:
    while len(sentence) > MAX_SENTENCE_CHARACTERS:
        space = sentence.rfind(" ", 0, MAX_SENTENCE_CHARACTERS)
        at = space if space > 0 else MAX_SENTENCE_CHARACTERS
        yield sentence[:at]
        sentence = sentence[at:].lstrip()
    if sentence:
        yield sentence
