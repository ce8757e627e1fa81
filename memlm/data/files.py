"""Rows in local files: JSON lines, JSON arrays and plain texts, all checked before the first is used.

A row is found again by its place in the file, so that rows can be taken in any order and none is held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memlm.data.formats import Format, make_row
from memlm.data.rows import Row, TextRow
from memlm.text import read_text


class JsonLines(Sequence[Row]):
    """The rows of files with one JSON object per line. Opening reads and checks every line.

    ValueError names the file and the line (from 1) that is not a row of the format of the first.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.format: Format
        places, expected = [], None
        for number, path in enumerate(self.paths):
            empty = True
            for line, start, raw in _lines(path):
                row = _parsed(raw, path, line)
                _, expected = make_row(row, _place(path, line), expected)
                places.append((number, start, line))
                empty = False
            if empty:
                raise ValueError(f"file {str(path)!r} is empty; give one row per line")
        assert expected is not None
        self.format = expected
        self._places = np.array(places, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        number, start, line = map(int, self._places[index])
        path = self.paths[number]
        with path.open("rb") as file:
            file.seek(start)
            raw = file.readline()
        return make_row(_parsed(raw, path, line), _place(path, line), self.format)[0]


class JsonArray(Sequence[Row]):
    """The rows of a JSON file that is one array of objects; all of it is held."""

    def __init__(self, path: Path) -> None:
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"file {str(path)!r} is not JSON ({error}); write one object per line"
            ) from error
        if not values:
            raise ValueError(f"file {str(path)!r} is empty; give at least one row")
        expected, self._rows = None, []
        for number, row in enumerate(values):
            made, expected = make_row(row, f"{str(path)!r} row {number}", expected)
            self._rows.append(made)
        assert expected is not None
        self.format = expected

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


class TextRows(Sequence[Row]):
    """UTF-8 text files, each a row of text, read when asked for. ValueError names a file without text."""

    def __init__(self, paths: Sequence[Path], form: Format) -> None:
        self.paths, self.format = list(paths), form
        for path in self.paths:
            if not path.is_file():
                raise ValueError(
                    f"file {str(path)!r} is a pipe or a device, and rows are read again and again; write "
                    "its text to a file"
                )
            if not any(map(str.strip, read_text(path))):
                raise ValueError(f"file {str(path)!r} is empty; remove it")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = self.paths[index]
        return TextRow("".join(read_text(path)), f"{str(path)!r}")


def is_array(path: Path) -> bool:
    """Whether a JSON file holds one array rather than an object per line."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number, first byte and bytes of every line that is not blank."""
    try:
        with path.open("rb") as file:
            start = 0
            for number, raw in enumerate(file, start=1):
                if raw.removeprefix(b"\xef\xbb\xbf").strip():
                    yield number, start, raw
                start += len(raw)
    except PermissionError as error:
        raise PermissionError(
            f"file {os.fspath(path)!r} may not be read; change its permissions"
        ) from error


def _parsed(raw: bytes, path: Path, line: int) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"{_place(path, line)} is not JSON ({error}); the file may be cut short: write one whole "
            "object per line"
        ) from error


def _place(path: Path, line: int) -> str:
    return f"{str(path)!r} line {line}"
