"""Results of an evaluation: counts by task and length, as a table and as JSON.

A report is data and draws nothing: pictures of it are in `plots`, a page about several in `page`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from memlm.eval.log import SAMPLES, Row, in_present_words, read_rows
from memlm.eval.statistics import mean_interval, wilson
from memlm.files import read_json, write_json
from memlm.tasks.lengths import format_length, parse_length

SUMMARY = "summary.json"
# The keys every line of samples.jsonl must have; runs of older versions may lack all others.
ROW_KEYS = ("task", "length", "index", "correct")


@dataclass(frozen=True)
class Cell:
    """Results of one task at one length.

    `correct` counts by the corrected BABILong metric, `exact` by exact match, `published` by the metric
    as published. `seconds` is the time for model and data, `data_seconds` the data's part of it. `writes`
    are the segments in which a write gate opened; None without gates. `f1` is the sum of the answers' token
    F1; None where answers are labels.
    """

    task: str
    length: str
    samples: int
    correct: int
    exact: int
    published: int
    tokens: int
    seconds: float
    data_seconds: float
    peak_memory_bytes: int
    writes: int | None = None
    f1: float | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.correct, self.samples)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def writes_per_million(self) -> float | None:
        """Segments written per million tokens; None without gates."""
        return None if self.writes is None else 1e6 * self.writes / max(self.tokens, 1)

    @property
    def mean_f1(self) -> float | None:
        """Mean token F1; None where answers are labels."""
        return None if self.f1 is None else self.f1 / self.samples

    @property
    def data_wait_share(self) -> float:
        return self.data_seconds / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Report:
    """All cells of an evaluation, with what is needed to repeat it.

    `skipped` says by task and length why a cell could not be run.
    """

    cells: list[Cell]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    stories: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """Accuracy by task and length: {"qa1": {"4k": 0.99}}."""
        return self._by_cell(lambda cell: cell.accuracy)

    @property
    def tasks(self) -> list[str]:
        """Tasks in the order they were evaluated, those skipped altogether last."""
        return list(dict.fromkeys([*(cell.task for cell in self.cells), *self.skipped]))

    @property
    def lengths(self) -> list[str]:
        """Lengths evaluated or skipped, shortest first."""
        skipped = {length for reasons in self.skipped.values() for length in reasons}
        return sorted({cell.length for cell in self.cells} | skipped, key=parse_length)

    def cell(self, task: str, length: str | int) -> Cell | None:
        """The results of a task at a length; None where there are none."""
        return self._found.get((task, format_length(length)))

    def at(self, length: str | int) -> list[Cell]:
        """The cells of a length."""
        named = format_length(length)
        return [cell for cell in self.cells if cell.length == named]

    def mean(self, length: str | int) -> float:
        """Mean accuracy over the tasks evaluated at `length`."""
        scores = [cell.accuracy for cell in self._some(length)]
        return sum(scores) / len(scores)

    def mean_interval(self, length: str | int) -> tuple[float, float]:
        """95% interval of `mean`; see `metrics.mean_interval`."""
        return mean_interval([(cell.correct, cell.samples) for cell in self._some(length)])

    def only(self, tasks: Iterable[str]) -> Report:
        """The same report without the other tasks."""
        kept = set(tasks)
        return replace(
            self,
            cells=[cell for cell in self.cells if cell.task in kept],
            skipped={task: value for task, value in self.skipped.items() if task in kept},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        return {
            "accuracy": self.accuracy,
            "counts": self._by_cell(lambda c: {"correct": c.correct, "samples": c.samples}),
            "interval": self._by_cell(lambda c: list(c.interval)),
            "exact_match": self._by_cell(lambda c: c.exact / c.samples),
            "babilong_published": self._by_cell(lambda c: c.published / c.samples),
            "tokens_per_second": self._by_cell(lambda c: c.tokens_per_second),
            "peak_memory_bytes": self._by_cell(lambda c: c.peak_memory_bytes),
            "data_wait_share": self._by_cell(lambda c: c.data_wait_share),
            "seconds": self._by_cell(lambda c: c.seconds),
            "writes_per_million": self._by_cell(lambda c: c.writes_per_million),
            "f1": self._by_cell(lambda c: c.mean_f1),
            "seed": self.settings.get("seed"),
            "settings": self.settings,
            "versions": self.versions,
            "stories": self.stories,
            "skipped": self.skipped,
            "cells": [asdict(cell) for cell in self.cells],
        }

    def to_markdown(self, intervals: bool = False) -> str:
        """Return a table of accuracies in percent, tasks down and lengths across.

        "-" is a cell that could not be run, with the reason below the table; `intervals` adds Wilson's
        95% interval to each cell.
        """
        lengths, tasks = self.lengths, self.tasks
        lines = [
            "| task | " + " | ".join(lengths) + " |",
            "|---" * (1 + len(lengths)) + "|",
        ]
        for task in tasks:
            row = [self._entry(task, length, intervals) for length in lengths]
            lines.append(f"| {escape_cell(task)} | " + " | ".join(row) + " |")
        partial = False
        if len(tasks) > 1:
            row = []
            for length in lengths:
                if not (found := self.at(length)):
                    row.append("-")
                    continue
                fewer = len(found) < len(tasks)
                partial |= fewer
                bounds = self.mean_interval(length) if intervals else None
                row.append(percent_range(self.mean(length), bounds) + "*" * fewer)
            lines.append("| mean | " + " | ".join(row) + " |")
        notes = ["\\* mean over the tasks that have a figure at this length"] if partial else []
        notes += [f"\\- {escape_cell(note)}" for note in self.skipped_notes()]
        notes += [note for note in (self.f1_note(),) if note]
        return "\n".join([*lines, *(["", *notes] if notes else [])])

    def skipped_notes(self) -> list[str]:
        """Say which cells could not be run, one line per reason."""
        where: dict[str, dict[str, list[str]]] = {}
        for task, reasons in self.skipped.items():
            for length, reason in reasons.items():
                where.setdefault(reason, {}).setdefault(length, []).append(task)
        notes = []
        for reason, cells in where.items():
            parts = []
            for length in sorted(cells, key=parse_length):
                every = len(cells[length]) == len(self.tasks)
                parts.append(length + ("" if every else f" ({', '.join(cells[length])})"))
            notes.append(f"not run at {', '.join(parts)}: {reason}")
        return notes

    def f1_note(self) -> str:
        """Mean token F1 by length, as a line; "" where answers are labels."""
        parts = [
            f"{cell.length} {percent(cell.mean_f1)}"
            for length in self.lengths
            for cell in self.at(length)
            if cell.mean_f1 is not None
        ]
        return f"mean token F1, percent: {', '.join(parts)}" if parts else ""

    def writes_note(self) -> str:
        """How often memories were written, by length over all tasks, as a line; "" without gates."""
        parts = []
        for length in self.lengths:
            found = [cell for cell in self.at(length) if cell.writes is not None]
            tokens = sum(cell.tokens for cell in found)
            if tokens:
                rate = 1e6 * sum(cell.writes or 0 for cell in found) / tokens
                parts.append(f"{length} {rate:,.0f}")
        return f"segments written per million tokens: {', '.join(parts)}" if parts else ""

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `summary.json`, whole or not at all; return the paths written.

        `plots.save_with_picture` writes the picture beside it as well.
        """
        path = Path(directory) / SUMMARY
        write_json(path, self.to_dict())
        return [path]

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Report:
        """Read the report that `save` left in a folder."""
        path = Path(directory) / SUMMARY
        try:
            saved = read_json(path)
            cells = [_read_cell(cell) for cell in saved["cells"]]
            parts = [saved.get(key, {}) for key in ("settings", "versions", "stories", "skipped")]
            if not all(isinstance(part, dict) for part in parts):
                raise TypeError("settings, versions, stories and skipped must be objects")
            report = cls(cells, in_present_words(parts[0]), parts[1], parts[2], skipped=parts[3])
            _ = report.lengths, report.skipped_notes()  # A length that is none fails here, by name.
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{str(path)!r} does not exist; name a finished evaluation") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a summary ({error}); run the evaluation again"
            ) from error
        return report

    @property
    def _found(self) -> dict[tuple[str, str], Cell]:
        return {(cell.task, cell.length): cell for cell in self.cells}

    def _some(self, length: str | int) -> list[Cell]:
        if cells := self.at(length):
            return cells
        known = sorted({cell.length for cell in self.cells}, key=parse_length)
        raise ValueError(f"length {format_length(length)!r} was not evaluated; lengths are {known}")

    def _entry(self, task: str, length: str, intervals: bool) -> str:
        cell = self.cell(task, length)
        if cell is None:
            return "-" if length in self.skipped.get(task, {}) else ""
        return percent_range(cell.accuracy, cell.interval if intervals else None)

    def _by_cell(self, value: Callable[[Cell], Any]) -> dict[str, dict[str, Any]]:
        table: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            table.setdefault(cell.task, {})[cell.length] = value(cell)
        return table


def load_rows(directory: str | os.PathLike[str]) -> list[Row]:
    """Read the samples of a run, one dict per line of `samples.jsonl`, whether it has ended or not.

    A last line cut short is skipped; of a sample written twice the later line counts. Keys other than
    task, length, index and correct may be absent in runs of older versions.
    """
    path = Path(directory) / SAMPLES
    if not path.is_file():
        raise ValueError(f"{str(path)!r} does not exist; name the folder of a run")
    rows: dict[tuple[str, str, int], Row] = {}
    for row in read_rows(path, ROW_KEYS):
        try:
            row["length"] = format_length(row["length"])
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} is damaged ({error}); remove lines of this length"
            ) from error
        rows[row["task"], row["length"], row["index"]] = row
    return list(rows.values())


def name_runs(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """Name runs after their folders, with as much of the path as tells them apart.

    "NAME=FOLDER" names a run by hand.
    """
    named: dict[str, Path] = {}
    unnamed: list[Path] = []
    for given in folders:
        text = os.fspath(given)
        name, mark, folder = text.partition("=")
        if not mark or Path(text).exists():
            unnamed.append(Path(text))
        elif not name or name in named:
            raise ValueError(f"run {text!r} needs a name of its own; write NAME=FOLDER")
        else:
            named[name] = Path(folder)
    paths = [path.resolve() for path in unnamed]
    if len(set(paths)) < len(paths):
        twice = next(str(path) for path in unnamed if paths.count(path.resolve()) > 1)
        raise ValueError(f"run {twice!r} is given twice; give each run once")
    for path, whole in zip(unnamed, paths, strict=True):
        for parts in range(1, len(whole.parts) + 1):
            name = "/".join(whole.parts[-parts:])
            alone = sum(other.parts[-parts:] == whole.parts[-parts:] for other in paths) == 1
            if alone and name not in named:
                break
        named[name] = path
    return named


def percent(score: float) -> str:
    """A share in percent, with a decimal where it has one: "97.3", "100"."""
    return f"{100 * score:.1f}".removesuffix(".0")


def percent_range(score: float, bounds: tuple[float, float] | None = None) -> str:
    """A share in percent with its interval, if any: "97 (92-99)"."""
    if bounds is None:
        return percent(score)
    return f"{percent(score)} ({percent(bounds[0])}-{percent(bounds[1])})"


def escape_cell(text: str) -> str:
    """Text as a line of Markdown that cannot break out of a table's cell or be read as HTML."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _read_cell(saved: dict[str, Any]) -> Cell:
    # Keys of later versions are ignored: what is known of a cell stays readable.
    later: dict[str, Any] = {name: saved.get(name) for name in ("writes", "f1")}
    known = {f.name: saved[f.name] for f in fields(Cell) if f.name not in later}
    cell = Cell(**known, **later)
    if not 0 <= cell.correct <= cell.samples or cell.samples < 1:
        raise ValueError(f"{cell.task} has {cell.correct} of {cell.samples} samples right")
    return cell
