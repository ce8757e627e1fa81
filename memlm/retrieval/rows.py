"""Chunks by row number: text, id and metadata, and which rows a filter allows.

A row number is given once and never again; removing leaves a gap.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

Value = str | int | float | bool | None


class Absent:
    """In a filter: chunks whose metadata does not have the key."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = Absent()
Row = tuple[str, str, str]  # id, text, metadata as JSON ("" for none)


def check_texts(texts: Sequence[str], name: str) -> list[str]:
    """The texts as a list. ValueError unless every one is non-blank text that UTF-8 can hold."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"{name} is one {type(texts).__name__}; give a list of texts")
    checked = _listed(texts, name)
    for position, text in enumerate(checked):
        _check_text(text, f"{name}[{position}]")
        if not text.strip():
            raise ValueError(f"{name}[{position}]={text!r} is empty; leave empty texts out")
    return checked


def _listed(values: Any, name: str) -> list[Any]:
    try:
        return list(values)
    except TypeError as error:
        raise ValueError(f"{name} is of type {type(values).__name__}; give a list") from error


def _check_text(text: Any, name: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{name} is of type {type(text).__name__}; give str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate at character {error.start}, which UTF-8 cannot hold; "
            "clean it with text.encode('utf-8', 'replace').decode('utf-8')"
        ) from error


def check_id(value: Any, name: str) -> str:
    """An id as JSON text, by which it is stored: 7 and "7" are two ids."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return str(int(value))
    if not isinstance(value, str):
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; give str or int")
    _check_text(value, name)
    if not value:
        raise ValueError(f"{name}='' is empty; give text, or ids=None to have ids made")
    return json.dumps(str(value), ensure_ascii=False)


def id_of(key: str) -> str | int:
    """The id as it was given."""
    return json.loads(key)


def check_ids(ids: Sequence[str | int], name: str = "ids") -> list[str]:
    """Ids as JSON texts, in order. ValueError when one is given twice."""
    if isinstance(ids, (str, bytes)):
        raise ValueError(f"{name}={ids!r} is one id; give a list of ids")
    checked = [check_id(value, f"{name}[{n}]") for n, value in enumerate(_listed(ids, name))]
    first: dict[str, int] = {}
    for position, value in enumerate(checked):
        if value in first:
            raise ValueError(
                f"{name}[{position}]={id_of(value)!r} was given before at {first[value]}; "
                "ids must be unique"
            )
        first[value] = position
    return checked


def check_metadata(metadata: Sequence[Mapping[str, Value]] | None, count: int) -> list[str]:
    """One JSON text per chunk ("" for none). ValueError unless `count` flat mappings of plain values."""
    if metadata is None:
        return [""] * count
    if isinstance(metadata, (Mapping, str, bytes)):
        raise ValueError("metadata must be a list, one mapping a text; wrap it in a list")
    given = _listed(metadata, "metadata")
    if len(given) != count:
        raise ValueError(f"metadata has {len(given)} entries for {count} texts; give one a text")
    return [_metadata_json(entry, f"metadata[{n}]") for n, entry in enumerate(given)]


def _metadata_json(entry: Any, name: str) -> str:
    if entry is None:
        return ""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name} is of type {type(entry).__name__}; give a mapping or None")
    plain = {}
    for key, value in entry.items():
        _check_text(key, f"a key of {name}, {key!r},")
        plain[str(key)] = _plain(value, f"{name}[{key!r}]")
    return json.dumps(plain, ensure_ascii=False) if plain else ""


def _plain(value: Any, name: str) -> Value:
    """`value` as one of the five kinds JSON returns unchanged."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        _check_text(value, name)
        return str(value)
    if isinstance(value, int):
        if value.bit_length() > 10_000:
            raise ValueError(f"{name} has {value.bit_length()} bits; give at most 10,000, or text")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{name}={value!r} is not finite; give a number, text or None")
        return float(value)
    raise ValueError(
        f"{name} is of type {type(value).__name__}; give str, int, float, bool or None"
    )


def check_where(where: Mapping[str, Any] | None) -> dict[str, list[Value | Absent]]:
    """A filter as key -> values allowed; {} allows every chunk."""
    if where is None:
        return {}
    if not isinstance(where, Mapping):
        raise ValueError(f"where is of type {type(where).__name__}; give a mapping key -> value")
    checked = {}
    for key, value in where.items():
        _check_text(key, f"a key of where, {key!r},")
        several = isinstance(value, (list, tuple, set, frozenset))
        values = list(value) if several else [value]
        checked[str(key)] = [v if v is ABSENT else _plain(v, f"where[{key!r}]") for v in values]
    return checked


def _posting_key(key: str, value: Value | Absent) -> tuple[str, bool, Value | Absent]:
    # True == 1 in Python, but a flag is not a number; 1 and 1.0 are the same.
    return key, isinstance(value, bool), value


@dataclass
class Rows:
    """Chunks by row. Lists are as long as rows were ever given; a removed row holds None."""

    entries: list[Row | None] = field(default_factory=list)
    row_of: dict[str, int] = field(default_factory=dict)
    alive: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1024, bool))
    next_row: int = 0
    text_bytes: int = 0
    _postings: dict[tuple[str, bool, Value | Absent], array[int]] = field(default_factory=dict)
    _posted: int = 0

    def __len__(self) -> int:
        return len(self.row_of)

    def __getitem__(self, row: int) -> Row:
        """Id, text and metadata JSON of a row that is there."""
        entry = self.entries[row]
        assert entry is not None
        return entry

    def live(self, start: int = 0) -> Iterator[int]:
        """Rows that are there, from `start` on, ascending."""
        return map(int, np.flatnonzero(self.alive[start : self.next_row]) + start)

    def append(self, new: Sequence[Row]) -> NDArray[np.int64]:
        """Give rows to new chunks, whose ids must be new; returns (n,) row numbers."""
        rows = np.arange(self.next_row, self.next_row + len(new), dtype=np.int64)
        self.put(rows, new)
        return rows

    def put(self, rows: NDArray[np.int64], new: Sequence[Row]) -> None:
        """Put chunks into rows, ascending and beyond all before."""
        self._reserve(int(rows[-1]) + 1 if len(rows) else self.next_row)
        for row, entry in zip(rows.tolist(), new, strict=True):
            self.entries.extend([None] * (row - len(self.entries)))
            self.entries.append(entry)
            self.text_bytes += len(entry[1])
        self._register(rows, [entry[0] for entry in new])

    def _register(self, rows: NDArray[np.int64], ids: Sequence[str]) -> None:
        self.row_of.update(zip(ids, rows.tolist(), strict=True))
        self.alive[rows] = True

    def _reserve(self, rows: int) -> None:
        if rows > len(self.alive):
            grown = np.zeros(max(rows, 2 * len(self.alive)), bool)
            grown[: len(self.alive)] = self.alive
            self.alive = grown
        self.next_row = max(self.next_row, rows)

    def skip_to(self, next_row: int) -> None:
        """Give no row below `next_row` again."""
        self._reserve(next_row)
        self.entries.extend([None] * (next_row - len(self.entries)))

    def remove(self, row: int) -> None:
        """Forget the chunk of a row; its id may have been given to another row meanwhile."""
        ident, text, _ = self[row]
        if self.row_of.get(ident) == row:
            del self.row_of[ident]
        self.alive[row] = False
        self.entries[row] = None
        self.text_bytes -= len(text)

    def allowed(self, where: dict[str, list[Value | Absent]]) -> NDArray[np.bool_] | None:
        """(next_row,) bool: chunks whose metadata holds one of the values for every key; None for all."""
        if not where:
            return None
        self._post()
        mask = self.alive[: self.next_row].copy()
        for key, values in where.items():
            matching = np.zeros(self.next_row, bool)
            for value in values:
                posted = _posting_key(key, ABSENT if value is ABSENT else value)
                rows = np.frombuffer(self._postings.get(posted, array("q")), np.int64)
                if value is ABSENT:
                    lacking = np.ones(self.next_row, bool)
                    lacking[rows] = False
                    matching |= lacking
                else:
                    matching[rows] = True
            mask &= matching
        return mask

    def _post(self) -> None:
        """Enter rows added since the last filtered search: who never filters pays nothing."""
        for row in self.live(self._posted):
            metadata = self[row][2]
            for key, value in json.loads(metadata).items() if metadata else ():
                self._postings.setdefault(_posting_key(key, value), array("q")).append(row)
                # Under ABSENT stand those that have the key, whatever its value.
                self._postings.setdefault(_posting_key(key, ABSENT), array("q")).append(row)
        self._posted = self.next_row


class MappedRows(Rows):
    """Rows whose texts stay in memory-mapped Arrow files; ids are in memory. They do not change."""

    def __init__(self) -> None:
        super().__init__()
        self._starts: list[int] = []
        self._blocks: list[tuple[NDArray[np.int64], pa.RecordBatch]] = []

    def map(self, batch: pa.RecordBatch, removed: NDArray[np.bool_]) -> None:
        """Add a batch with columns row, id, text, metadata; rows where `removed` is True are not there."""
        rows = batch.column("row").to_numpy()
        if not len(rows):
            return
        self._starts.append(int(rows[0]))
        self._blocks.append((rows, batch))
        self._reserve(int(rows[-1]) + 1)
        kept = ~removed[rows]
        ids = batch.column("id").to_pylist()
        self._register(rows[kept], [i for i, keep in zip(ids, kept, strict=True) if keep])

    def skip_to(self, next_row: int) -> None:
        self._reserve(next_row)

    def __getitem__(self, row: int) -> Row:
        rows, batch = self._blocks[bisect_right(self._starts, row) - 1]
        at = int(np.searchsorted(rows, row))
        ident, text, notes = (batch.column(c)[at].as_py() for c in ("id", "text", "metadata"))
        return ident, text, notes
