"""Results of an evaluation: counts by task and length, as a table, as JSON and as pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.eval.babilong import format_length, parse_length
from memlm.eval.metrics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUMMARY = "summary.json"
PICTURE = "accuracy.png"


@dataclass(frozen=True)
class Cell:
    """Results of one task at one length.

    `correct` counts by the mended BABILong metric, `exact` by exact match, `published` by the metric
    as published. `seconds` is time in the model and its data, `data_seconds` the data's part.
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
    def data_wait_share(self) -> float:
        return self.data_seconds / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Report:
    """All cells of an evaluation, with what is needed to repeat it."""

    cells: list[Cell]
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    stories: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def accuracy(self) -> dict[str, dict[str, float]]:
        """Accuracy by task and length: {"qa1": {"4k": 0.99}}."""
        return self._by_cell(lambda cell: cell.accuracy)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.task for cell in self.cells))

    @property
    def lengths(self) -> list[str]:
        return sorted({cell.length for cell in self.cells}, key=parse_length)

    def mean(self, length: str | int) -> float:
        """Mean accuracy over the tasks evaluated at `length`."""
        named = format_length(length)
        scores = [cell.accuracy for cell in self.cells if cell.length == named]
        if not scores:
            raise ValueError(f"length {named!r} was not evaluated; lengths are {self.lengths}")
        return sum(scores) / len(scores)

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
            "seed": self.settings.get("seed"),
            "settings": self.settings,
            "versions": self.versions,
            "stories": self.stories,
            "cells": [asdict(cell) for cell in self.cells],
        }

    def to_markdown(self) -> str:
        """Return a table of accuracies in percent, tasks down and lengths across."""
        lines = [
            "| task | " + " | ".join(self.lengths) + " |",
            "|---" * (1 + len(self.lengths)) + "|",
        ]
        for task in self.tasks:
            row = [self.accuracy[task].get(length) for length in self.lengths]
            lines.append(f"| {task} | " + " | ".join(map(_percent, row)) + " |")
        if len(self.tasks) > 1:
            means = [self.mean(length) for length in self.lengths]
            lines.append("| mean | " + " | ".join(map(_percent, means)) + " |")
        return "\n".join(lines)

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `summary.json` and `accuracy.png`, each whole or not at all; return their paths."""
        from memlm.state import write_json

        folder = Path(directory)
        write_json(folder / SUMMARY, self.to_dict())
        plot_heat_map(self, folder / PICTURE)
        return [folder / SUMMARY, folder / PICTURE]

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Report:
        """Read the report that `save` left in a folder."""
        path = Path(directory) / SUMMARY
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            cells = [Cell(**cell) for cell in saved["cells"]]
        except FileNotFoundError as error:
            raise ValueError(f"{str(path)!r} does not exist; name a finished evaluation") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is not a summary; run the evaluation again") from error
        return cls(cells, saved["settings"], saved["versions"], saved["stories"])

    def _by_cell(self, value: Callable[[Cell], Any]) -> dict[str, dict[str, Any]]:
        table: dict[str, dict[str, Any]] = {}
        for cell in self.cells:
            table.setdefault(cell.task, {})[cell.length] = value(cell)
        return table


def plot_heat_map(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw accuracy by task and length, green for right and red for wrong, figures in percent."""
    lengths, tasks = report.lengths, report.tasks
    figure, axes = _figure(2.0 + 0.8 * max(3, len(lengths)), 1.3 + 0.55 * max(1, len(tasks)))
    table = [
        [report.accuracy[task].get(length, float("nan")) for length in lengths] for task in tasks
    ]
    image = axes.imshow(table, cmap="RdYlGn", vmin=0.0, vmax=1.0, aspect="auto")
    for row, scores in enumerate(table):
        for column, score in enumerate(scores):
            if score == score:  # NaN marks a cell that was not evaluated.
                axes.text(column, row, _percent(score), ha="center", va="center", color="black")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_xlabel("length of the context, tokens")
    axes.set_title("accuracy, %")
    figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1], format=lambda value, _: f"{100 * value:.0f}")
    _save(figure, path)


def plot_lines(
    reports: Mapping[str, Report], path: str | os.PathLike[str], chance: float | None = None
) -> None:
    """Draw mean accuracy over tasks against length, a line a run, with the 95% interval shaded.

    `chance` is what guessing scores, drawn as a dashed line.
    """
    if not reports:
        raise ValueError("reports is empty; give at least one {name: report}")
    lengths = sorted({x for r in reports.values() for x in r.lengths}, key=parse_length)
    figure, axes = _figure(7.0, 4.2)
    for name, report in reports.items():
        at = [lengths.index(length) for length in report.lengths]
        means = [100 * report.mean(length) for length in report.lengths]
        bounds = [_pooled(report, length) for length in report.lengths]
        (line,) = axes.plot(at, means, marker="o", label=name)
        low, high = [100 * b[0] for b in bounds], [100 * b[1] for b in bounds]
        axes.fill_between(at, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    if chance is not None:
        axes.axhline(100 * chance, color="grey", linestyle="--", linewidth=1, label="guessing")
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_ylim(0, 102)
    axes.set_xlabel("length of the context, tokens")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left" if chance is not None else "best")
    _save(figure, path)


def _pooled(report: Report, length: str) -> tuple[float, float]:
    cells = [cell for cell in report.cells if cell.length == length]
    return wilson(sum(cell.correct for cell in cells), sum(cell.samples for cell in cells))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Without pyplot: no window system is looked for and no global figure is left behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    from memlm.state import write_atomically

    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}".removesuffix(".0")
