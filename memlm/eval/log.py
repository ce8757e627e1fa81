"""The samples an evaluation has finished, in memory and in a folder, and the settings they were made with.

`run.json` holds the settings, and a folder of other settings is refused; `samples.jsonl` gets a line per
sample, so that a run that was killed goes on after its last whole line. Of several processes each writes a
file of its own, `samples-RANK.jsonl`, which are joined at the end, or when the run goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from memlm.files import parse_json, read_json, write_json, write_text

SAMPLES = "samples.jsonl"
RUN = "run.json"
# The values in runs of older versions, which did not record these settings.
ABSENT: dict[str, Any] = {"position": [0.0, 1.0], "composition": "exact"}
# Former words for the value of a setting, with the present ones.
FORMER_WORDS = {"baseline": {"none": "last-tokens"}}

Row = dict[str, Any]


class RunLog:
    """The rows done so far, by their `keys`; with `out`, also in the file `name` of that folder.

    part: the number of this process, of several, whose rows go into a file of its own.
    ValueError when the folder holds a run of other settings, or a damaged line that is not the last.
    """

    def __init__(
        self,
        out: str | os.PathLike[str] | None,
        settings: dict[str, Any],
        keys: Sequence[str] = ("task", "length", "index"),
        name: str = SAMPLES,
        part: int | None = None,
    ) -> None:
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.keys = tuple(keys)
        self._file: IO[str] | None = None
        self._path: Path | None = None
        if out is None:
            return
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        self._whole = self._path = folder / name
        _check_run(folder, name, settings)
        if part is None or part == 0:
            join_parts(self._whole, self.keys)
        if part is not None:
            self._path = part_of(self._whole, part)
        self.read_again(mend=part is None)

    def __enter__(self) -> Self:
        if self._path is not None:
            self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def read_again(self, mend: bool = False) -> None:
        """Take up the rows that are in the folder by now."""
        if self._path is not None:
            for row in read_rows(self._whole, self.keys, mend=mend):
                self.rows[self._key(row)] = row

    def has(self, *key: Any) -> bool:
        return key in self.rows

    def append(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.rows[self._key(row)] = row
        if self._file is not None:
            self._file.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
            self._file.flush()

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in self.keys)


def part_of(path: Path, part: int) -> Path:
    """The file of one process of several, beside the file of all."""
    return path.with_name(f"{path.stem}-{part}{path.suffix}")


def join_parts(
    path: Path, keys: Sequence[str], order: Sequence[tuple[Any, ...]] | None = None
) -> None:
    """Put what several processes wrote, if any, into the file of all. One process calls it, others wait.

    order: the keys in the order that the rows shall have; those of rows not among them come first.
    """
    parts = [
        p
        for p in path.parent.glob(f"{path.stem}-*{path.suffix}")
        if p.stem[len(path.stem) + 1 :].isdigit()
    ]
    if not parts:
        return
    rows = {tuple(row[key] for key in keys): row for row in read_rows(path, keys)}
    for part in sorted(parts):
        for row in read_rows(part, keys):
            rows.setdefault(tuple(row[key] for key in keys), row)
    if order is not None:
        place = {key: number for number, key in enumerate(order)}
        rows = dict(sorted(rows.items(), key=lambda item: place.get(item[0], -1)))
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    for part in parts:
        part.unlink()


def recorded(out: str | os.PathLike[str] | None) -> dict[str, Any]:
    """The settings of the run in a folder; none where there is no run, or none that can be read."""
    try:
        found = read_json(Path(out) / RUN) if out else {}
    except (OSError, ValueError):
        return {}
    return in_present_words(found) if isinstance(found, dict) else {}


def in_present_words(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, in the words of this version where an older one had others."""
    former = {
        key: words[settings[key]]
        for key, words in FORMER_WORDS.items()
        if isinstance(settings.get(key), str) and settings[key] in words
    }
    return settings | former


def _check_run(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Refuse a folder with samples of another run; note the settings in a fresh one."""
    path = folder / RUN
    if not path.exists():
        if (folder / name).exists():
            raise ValueError(
                f"out={str(folder)!r} has {name} but no {RUN} to say how they were made; "
                "use another folder"
            )
        write_json(path, settings)
        return
    try:
        before = read_json(path)
        wanted = json.loads(json.dumps(settings))
        had, has = ({**ABSENT, **in_present_words(made)} for made in (before, wanted))
        # A setting that only one of them has counts, too: a run with passages only goes on with passages.
        different = [key for key in {**has, **had} if had.get(key) != has.get(key)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} is not readable JSON; use another folder") from error
    if different:
        key = different[0]
        raise ValueError(
            f"out={str(folder)!r} holds a run with {key}={had.get(key)!r}, this one has "
            f"{has.get(key)!r}; use another folder or the same settings"
        )


def read_rows(path: Path, keys: Sequence[str], mend: bool = False) -> list[Row]:
    """Return the rows on disk, without a last line that a kill cut short; `mend` removes it there, too."""
    if not path.exists():
        return []
    content = path.read_bytes()
    rows: list[Row] = []
    good = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError("the line has no end")
            row = parse_json(line)
            missing = set(keys) - row.keys()
            if missing:
                raise ValueError(f"the line lacks {sorted(missing)[0]!r}")
        except (ValueError, AttributeError) as error:
            if number < len(lines):
                raise ValueError(
                    f"{str(path)!r} line {number} is damaged ({error}); remove the line"
                ) from error
            if mend:
                os.truncate(path, good)
            break
        rows.append(row)
        good += len(line)
    return rows
