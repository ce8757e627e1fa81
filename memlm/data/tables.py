"""Rows of tables and of data sets of the hub, streamed through `datasets`.

Local tables are read once to check every row; rows of the hub are checked as they come.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from memlm.data.formats import Format, make_row
from memlm.data.rows import Row

BUILDERS = {".parquet": "parquet", ".csv": "csv"}
# Rows held while a stream is shuffled: each is drawn from as many.
SHUFFLED_AMONG = 1000


class StreamedRows(Iterable[Row]):
    """Rows that are read from the beginning each time.

    size: how many there are; None where only reading all of them would tell.
    """

    def __init__(self, name: str, stream: Any, column: str | None = None, *, check: bool) -> None:
        self.name = name
        self.stream = stream
        self.column = column
        self.size: int | None = None
        self.remedy = "write it again" if check else "check the connection and the data set"
        self.format: Format
        rows = self._rows(stream, None)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{name!r} holds no row; give at least one")
        self.format = first[1]
        if check:
            self.size = 1 + sum(1 for _ in rows)

    def __iter__(self) -> Iterator[Row]:
        for row, _ in self._rows(self.stream, self.format):
            yield row

    def epoch(self, number: int, seed: int) -> Iterator[Row]:
        """All rows in an order that seed and epoch decide: each is drawn from those that come next."""
        shuffled = self.stream.shuffle(seed=seed, buffer_size=SHUFFLED_AMONG)
        shuffled.set_epoch(number)
        for row, _ in self._rows(shuffled, self.format):
            yield row

    def _rows(self, stream: Any, expected: Format | None) -> Iterator[tuple[Row, Format]]:
        for number, values in enumerate(self._read(stream)):
            where = f"{self.name!r} row {number}"
            if self.column is not None:
                if self.column not in values:
                    raise ValueError(
                        f"{where} has no column {self.column!r}; its columns are {', '.join(values)}"
                    )
                values = {"text": values[self.column]}
            made, expected = make_row(values, where, expected)
            yield made, expected

    def _read(self, stream: Any) -> Iterator[Any]:
        try:
            yield from stream
        except Exception as error:
            raise ValueError(
                f"{self.name!r} cannot be read ({_reason(error)}); {self.remedy}"
            ) from error


def open_tables(paths: Sequence[Path], name: str) -> StreamedRows:
    """The rows of Parquet or CSV files, all checked."""
    import datasets

    builder = BUILDERS[paths[0].suffix.lower()]
    for path in paths:
        if not path.stat().st_size:
            raise ValueError(f"file {str(path)!r} is empty; give at least one row")
    try:
        options = _all_text(paths[0]) if builder == "csv" else {}
        stream = datasets.load_dataset(
            builder,
            data_files=[str(path) for path in paths],
            split="train",
            streaming=True,
            **options,
        )
    except Exception as error:  # `datasets` raises a different type for every cause.
        raise ValueError(f"{name!r} cannot be read ({_reason(error)}); write it again") from error
    return StreamedRows(name, stream, check=True)


def _all_text(path: Path) -> dict[str, Any]:
    """How to read a CSV file, whose cells have no types: 12 and NA are what somebody wrote."""
    import datasets

    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next(filter(None, csv.reader(file)), [])
    return {
        "features": datasets.Features({name: datasets.Value("string") for name in names}),
        "keep_default_na": False,
    }


def open_hub(name: str, config: str | None, column: str | None, split: str) -> StreamedRows:
    """The rows of a split of a hub data set. column: one to read as text, instead of a format's own."""
    import datasets

    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        raise ValueError(
            f"{name!r} is no file here, and cannot be opened as a data set of the hub "
            f"({_reason(error)}); check the path or id, its split {split!r} and the connection"
        ) from error
    return StreamedRows(name, stream, column, check=False)


def _reason(error: Exception) -> str:
    first = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {first}"
