"""The results of loss by position: bins, their means over documents, intervals, and a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memlm.eval.log import Row
from memlm.tasks.lengths import format_length

SUMMARY = "perplexity.json"
PICTURE = "perplexity.png"

# Student's t at 97.5%, by degrees of freedom; few documents are the rule here.
_T = (12.7062, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814)


@dataclass(frozen=True)
class Estimate:
    """A mean over documents with its 95% interval (Student's t); no interval from one document."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimate the mean of independent values, of which there is at least one."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean)
        spread = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        half = student_t(count - 1) * math.sqrt(spread / count)
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.mean:.3f}{interval}"


def student_t(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t with `freedom` degrees of freedom."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    # Hill's expansion about the normal quantile: right to four places from ten degrees on.
    z = 1.959963985
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


@dataclass(frozen=True)
class Bin:
    """Predictions made at positions `start` to `end` - 1, in nats per token but for the bits.

    baseline: each segment read from an empty memory. gain: baseline less loss, paired by document.
    Both are None for a model without memories.
    """

    start: int
    end: int
    documents: int
    predictions: int
    loss: Estimate
    bits_per_byte: Estimate
    baseline: Estimate | None = None
    gain: Estimate | None = None


@dataclass(frozen=True)
class PerplexityReport:
    """Loss by position, over all documents of a run.

    change: the loss of the last bin less that of the second; gain_change: the same of the gain; both
    paired by document, None where there are no such bins. overall: a bin of all positions.
    """

    bins: list[Bin]
    overall: Bin
    change: Estimate | None
    gain_change: Estimate | None
    segment_length: int
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(self.overall.loss.mean)

    @property
    def verdict(self) -> str:
        """In plain words: does loss keep falling with position, and is the memory what lowers it?"""
        if self.change is None:
            told = "The documents are too short to tell: they end before a third bin of positions."
        else:
            by = (
                f"in the last bin ({_span(self.bins[-1])}) it is {self.change.mean:+.3f} nats against "
                f"the second ({_span(self.bins[1])})"
            )
            if self.change.low is None or self.change.high is None:
                told = f"One document cannot tell whether loss keeps falling; {by}."
            else:
                by += f", 95% interval {self.change.low:+.3f} to {self.change.high:+.3f}"
                if self.change.high < 0:
                    told = f"Loss keeps falling with position: {by}."
                elif self.change.low > 0:
                    told = f"Loss rises with position: {by}."
                else:
                    told = f"Loss neither falls nor rises beyond chance: {by}."
        if self.gain_change is None or self.change is None:
            return told
        gain = self.bins[-1].gain
        assert gain is not None
        told += f" There the memory of the past gains {gain} nats, "
        told += f"{self.gain_change.mean:+.3f} against the second bin"
        if self.gain_change.low is not None and self.gain_change.high is not None:
            told += f" ({self.gain_change.low:+.3f} to {self.gain_change.high:+.3f})"
        return told + "."

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `perplexity.json`."""
        return {
            "verdict": self.verdict,
            "perplexity": self.perplexity,
            "overall": asdict(self.overall),
            "bins": [asdict(found) for found in self.bins],
            "change": None if self.change is None else asdict(self.change),
            "gain_change": None if self.gain_change is None else asdict(self.gain_change),
            "segment_length": self.segment_length,
            "notes": self.notes,
            "settings": self.settings,
            "versions": self.versions,
        }

    def to_markdown(self) -> str:
        """Return a table of the bins, the verdict and the notes."""
        remembers = self.overall.gain is not None
        titles = ["positions", "segments", "documents", "nats per token", "bits per byte"]
        titles += ["without the past", "gain"] if remembers else []
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for found in [*self.bins, self.overall]:
            whole = found is self.overall
            cells = [
                "all" if whole else _span(found),
                "" if whole else self._segments(found),
                str(found.documents),
                str(found.loss),
                str(found.bits_per_byte),
            ]
            cells += [str(found.baseline), str(found.gain)] if remembers else []
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, "", self.verdict, *(f"Note: {note}." for note in self.notes)])

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write `perplexity.json` and `perplexity.png`, each whole or not at all; return their paths."""
        from memlm.files import write_json

        folder = Path(directory)
        write_json(folder / SUMMARY, self.to_dict())
        plot_perplexity(self, folder / PICTURE)
        return [folder / SUMMARY, folder / PICTURE]

    def _segments(self, found: Bin) -> str:
        first = found.start // self.segment_length + 1
        last = (found.end - 1) // self.segment_length + 1
        return str(first) if first == last else f"{first}-{last}"


def _span(found: Bin) -> str:
    return f"{found.start}-{found.end - 1}"


def summarise(
    rows: Sequence[Row],
    edges: NDArray[np.int64],
    segment_length: int,
    notes: Sequence[str] = (),
    settings: dict[str, Any] | None = None,
) -> PerplexityReport:
    """Average rows of the log over documents, bin by bin; every document weighs the same."""
    longest = max(row["tokens"] for row in rows) - 1
    ends = [*edges[1:].tolist(), longest]
    found = []
    for number, (start, end) in enumerate(zip(edges.tolist(), ends, strict=True)):
        bin_ = _bin(rows, [number], start, min(end, longest))
        if bin_ is not None:
            found.append(bin_)
    overall = _bin(rows, range(len(edges)), 0, longest)
    if overall is None:
        raise ValueError("documents of one token predict nothing; give longer ones")
    last = len(found) - 1
    change = gain_change = None
    if last >= 2:
        losses = [(_mean(row, 1, "nats"), _mean(row, last, "nats")) for row in rows]
        change = _paired(losses)
        if overall.gain is not None:
            gain_change = _paired([(_gain(row, 1), _gain(row, last)) for row in rows])
    return PerplexityReport(
        found,
        overall,
        change,
        gain_change,
        segment_length,
        list(notes),
        settings or {},
    )


def _bin(rows: Sequence[Row], numbers: Sequence[int], start: int, end: int) -> Bin | None:
    def total(row: Row, key: str) -> float:
        return math.fsum(row[key][number] for number in numbers)

    there = [row for row in rows if total(row, "predictions")]
    if not there:
        return None
    counts = [total(row, "predictions") for row in there]
    nats = [total(row, "nats") for row in there]
    bits = [
        value / math.log(2) / max(total(row, "bytes"), 1)
        for row, value in zip(there, nats, strict=True)
    ]
    baseline = gain = None
    if all(row["baseline_nats"] is not None for row in there):
        alone = [total(row, "baseline_nats") for row in there]
        baseline = Estimate.of([a / n for a, n in zip(alone, counts, strict=True)])
        gain = Estimate.of([(a - v) / n for a, v, n in zip(alone, nats, counts, strict=True)])
    loss = Estimate.of([value / n for value, n in zip(nats, counts, strict=True)])
    return Bin(start, end, len(there), int(sum(counts)), loss, Estimate.of(bits), baseline, gain)


def _mean(row: Row, number: int, key: str) -> float | None:
    count = row["predictions"][number]
    return row[key][number] / count if count else None


def _gain(row: Row, number: int) -> float | None:
    alone, loss = _mean(row, number, "baseline_nats"), _mean(row, number, "nats")
    return None if alone is None or loss is None else alone - loss


def _paired(pairs: Sequence[tuple[float | None, float | None]]) -> Estimate | None:
    """Estimate second less first, over the documents that have both."""
    differences = [b - a for a, b in pairs if a is not None and b is not None]
    return Estimate.of(differences) if differences else None


def plot_perplexity(report: PerplexityReport, path: str | os.PathLike[str]) -> None:
    """Draw loss by position, with and without the past, and below it the gain; intervals shaded."""
    # Without pyplot, which would look for a window system and keep a global figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from memlm.files import write_atomically

    remembers = report.overall.gain is not None
    figure = Figure(figsize=(7.0, 6.0 if remembers else 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        2 if remembers else 1, 1, sharex=True, squeeze=False,
        height_ratios=[2, 1] if remembers else [1],
    )[:, 0]  # fmt: skip
    at = list(range(len(report.bins)))

    def draw(panel: Any, values: Sequence[Estimate | None], label: str, **style: Any) -> None:
        known = [value for value in values if value is not None]
        (line,) = panel.plot(at, [value.mean for value in known], label=label, **style)
        low = [value.mean if value.low is None else value.low for value in known]
        high = [value.mean if value.high is None else value.high for value in known]
        panel.fill_between(at, low, high, alpha=0.15, color=line.get_color(), linewidth=0)

    name = "with its memory" if remembers else "independent windows"
    draw(panels[0], [b.loss for b in report.bins], name, marker="o")
    if remembers:
        style = {"marker": "s", "color": "grey", "linestyle": "--"}
        draw(
            panels[0],
            [b.baseline for b in report.bins],
            "each segment from an empty memory",
            **style,
        )
        draw(panels[1], [b.gain for b in report.bins], "gain", marker="o", color="tab:green")
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[1].set_ylabel("gain from the past,\nnats per token")
    panels[0].set_ylabel("loss, nats per token")
    panels[0].legend(loc="best")
    count = report.overall.documents
    alike = "" if report.bins[-1].documents == count else "up to "
    shaded = "; shaded: 95% intervals over documents" if count > 1 else ""
    panels[0].set_title(
        f"{count} document{'s' * (count > 1)} of {alike}"
        f"{format_length(report.overall.end + 1)} tokens{shaded}",
        fontsize=10,
    )
    panels[-1].set_xlabel("position in the document, tokens")
    # The last prediction is made at the last position but one; the document ends one later.
    ends = [b.end + (b.end == report.overall.end) for b in report.bins]
    labels = [
        f"{format_length(b.start) if b.start else 0} to {format_length(end)}"
        for b, end in zip(report.bins, ends, strict=True)
    ]
    many = len(labels) > 7
    panels[-1].set_xticks(at, labels, rotation=35 if many else 0, ha="right" if many else "center")
    for panel in panels:
        panel.grid(alpha=0.3)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
