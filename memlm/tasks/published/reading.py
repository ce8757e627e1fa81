"""Published samples, read without ever holding a file.

Layouts: data/TASK/LENGTH.json, one array per file (or .jsonl); LENGTH/TASK-*.parquet; and data sets of the
hub, whose configuration is the length and whose split is the task.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from memlm.tasks.babi.story import check_task
from memlm.tasks.lengths import format_length
from memlm.tasks.published.records import COLUMNS, Record
from memlm.tasks.published.writing import CARD

_READ_CHARACTERS = 1 << 16
_SPACE = re.compile(r"[ \t\n\r]*")


def load(source: str | os.PathLike[str], task: str, length: str | int) -> list[Record]:
    """Read all samples of `iterate` at once."""
    return list(iterate(source, task, length))


def iterate(
    source: str | os.PathLike[str],
    task: str,
    length: str | int,
    limit: int | None = None,
    *,
    streaming: bool = False,
) -> Iterator[Record]:
    """Yield ready-made samples of a local folder or a hub data set, one at a time, at most `limit`.

    A folder has `data/TASK/LENGTH.json` or `.jsonl`, or `LENGTH/TASK-*.parquet`, each with or without
    `data/`, or a data set card that says what its files are. A hub data set is downloaded once and
    kept by `datasets`; with `streaming` only the samples read are downloaded, again each time.
    """
    check_task(task)
    named = format_length(length)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1, or None for all samples")
    name = os.fspath(source)
    folder = Path(name).expanduser()
    if folder.is_dir():
        rows = _local_rows(folder, task, named, streaming)
    elif folder.exists():
        raise ValueError(f"{name!r} is a file; name the folder that holds data/TASK/LENGTH.json")
    elif name.startswith((".", "/", "~")):
        raise ValueError(f"folder {name!r} does not exist; name a folder or a hub id")
    else:
        rows = _hub_rows(name, task, named, streaming)
    return islice((_checked(*row) for row in rows), limit)


def _checked(where: str, number: int, row: Any) -> Record:
    """Return row `number`, counted from 0, with the columns of a sample; ValueError without these."""
    if not isinstance(row, dict):
        raise ValueError(
            f"row {number} of {where} is a {type(row).__name__}, not an object with the columns "
            "input, question and target"
        )
    for key in COLUMNS:
        if key not in row:
            raise ValueError(
                f"row {number} of {where} lacks {key!r}; columns must be input, question and target"
            )
        if not isinstance(row[key], str):
            raise ValueError(
                f"row {number} of {where} has {key}={str(row[key])[:40]!r}, a "
                f"{type(row[key]).__name__}; columns must be strings"
            )
    return Record(input=row["input"], question=row["question"], target=row["target"])


_Rows = Iterator[tuple[str, int, Any]]


def _local_rows(folder: Path, task: str, length: str, streaming: bool) -> _Rows:
    for root in (folder / "data", folder):
        for suffix in (".json", ".jsonl"):
            path = root / task / f"{length}{suffix}"
            if path.is_file():
                return _json_rows(path)
        shards = sorted((root / length).glob(f"{task}-*.parquet"))
        if shards:
            return _parquet_rows(shards)
    if (folder / CARD).is_file():
        return _hub_rows(str(folder), task, length, streaming)
    raise ValueError(
        f"folder {str(folder)!r} has neither data/{task}/{length}.json nor "
        f"{length}/{task}-*.parquet; choose a task and a length that are there"
    )


def _json_rows(path: Path) -> _Rows:
    """Read an array of objects, or objects one after the other, only as they are taken."""
    number = 0
    try:
        # Some editors begin a file with a mark of its encoding.
        with path.open(encoding="utf-8-sig") as stream:
            text = _Json(stream.read)
            array = text.next() == "["
            if array:
                text.at += 1
            while (char := text.next()) != ("]" if array else ""):
                if array and number:
                    text.expect(",")
                    char = text.next()
                if char != "{":
                    raise _Damaged(f"an object is expected, not {char or 'the end'!r}")
                yield repr(str(path)), number, text.value()
                number += 1
            if array:
                text.at += 1
                text.expect("")
            elif not number:
                raise _Damaged("it is empty")
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, _Damaged) as error:
        raise ValueError(
            f"row {number} of {str(path)!r} is not JSON ({error}); download the file again"
        ) from error


class _Damaged(Exception):
    """What is wrong with a file."""


class _Json:
    """Decodes JSON values from a text, holding only what is not decoded yet."""

    def __init__(self, read: Callable[[int], str]) -> None:
        self.read = read
        self.text = ""
        self.at = 0
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        # Half as much again as is held: a long row is scanned three times in all, not once per piece.
        found = self.read(max(_READ_CHARACTERS, (len(self.text) - self.at) // 2))
        self.text = self.text[self.at :] + found
        self.at = 0
        return bool(found)

    def next(self) -> str:
        """Skip blanks; return the next character, "" at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def expect(self, char: str) -> None:
        found = self.next()
        if found != char:
            raise _Damaged(f"{char or 'the end'!r} is expected, not {found or 'the end'!r}")
        self.at += len(char)

    def value(self) -> Any:
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except json.JSONDecodeError as error:
                # A string or a word may go on in text not read yet; reading on cures no other fault.
                open_ended = error.msg.startswith("Unterminated string")
                if not open_ended and error.pos < len(self.text) - 16:
                    raise
                if not self.more():
                    raise


def _parquet_rows(paths: Sequence[Path]) -> _Rows:
    import pyarrow
    import pyarrow.parquet

    for path in paths:
        number = 0
        try:
            # Through a small buffer; otherwise a whole column of a group of rows is read at once.
            with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20) as file:
                names = [name for name in file.schema_arrow.names if name in COLUMNS]
                # One reader of all groups would keep what it read of each until the end.
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(batch_size=1, row_groups=[group], columns=names):
                        for row in batch.to_pylist():
                            yield repr(str(path)), number, row
                            number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"row {number} of {str(path)!r} is not parquet ({str(error)[:200]}); "
                "download the file again"
            ) from error


def _hub_rows(source: str, task: str, length: str, streaming: bool) -> _Rows:
    import datasets

    try:
        rows = datasets.load_dataset(source, length, split=task, streaming=streaming)
    except Exception as error:  # `datasets` raises a different type for every cause.
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{source!r} {task} {length} cannot be loaded ({type(error).__name__}: {reason}); "
            "name a folder, or check the id and the connection"
        ) from error
    where = f"{source!r} {length} {task}"
    return ((where, number, row) for number, row in enumerate(rows))
