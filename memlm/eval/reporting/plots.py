"""Pictures of results, as PNG: accuracy by task and length, against length, against depth; and cost.

Runs are told apart by marker and dashes as well as by colour, so that a picture can be read in grey.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.eval.reporting.report import Report
from memlm.eval.statistics import wilson
from memlm.files import write_atomically
from memlm.tasks.lengths import format_length, parse_length

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct to colour-blind readers, darkest first.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)))
_GREY = "#666666"
# Colours of a heat map: one scale from dark to light, so that it reads the same in grey.
_SCALE = "viridis"
# The picture that every evaluation writes beside its summary.
PICTURE = "accuracy.png"
DEPTH_BINS = 10
# Distances below this many tokens are one bin: few facts stand there.
NEAR = 64


@dataclass(frozen=True)
class AccuracyBin:
    """Samples between two positions, `low` included and `high` not."""

    low: float
    high: float
    correct: int
    samples: int


def save_with_picture(report: Report, directory: str | os.PathLike[str]) -> list[Path]:
    """Write `summary.json` and `accuracy.png`, as every evaluation does; return their paths."""
    picture = Path(directory) / PICTURE
    written = report.save(directory)
    plot_heat_map(report, picture)
    return [*written, picture]


def plot_heat_map(reports: Report | Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Draw accuracy by task and length in percent, light for right and dark for wrong, one panel per run.

    Below a figure stand its 95% interval and its samples. Hatched cells could not be run, white ones
    were not.
    """
    runs: dict[str, Report] = dict(reports) if isinstance(reports, Mapping) else {"": reports}
    if not runs:
        raise ValueError("reports is empty; give at least one {name: report}")
    lengths = sorted({x for r in runs.values() for x in r.lengths}, key=parse_length)
    # With hundreds of cells there is only room for the figures.
    small = sum(len(report.tasks) for report in runs.values()) <= 60
    tall = 0.5 if small else 0.3
    heights = [max(1, len(report.tasks)) * tall for report in runs.values()]
    height = sum(heights) + 0.75 * len(runs) + 0.4
    figure = _figure(2.2 + max(3, len(lengths)), height)
    panels = figure.subplots(len(runs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, report) in zip(panels, runs.items(), strict=True):
        image = _heat(axes, report, lengths, small)
        title = f"accuracy, %: {_plain(name)}" if name else "accuracy, %"
        axes.set_title(title, loc="left", fontsize=11)
    panels[-1].set_xlabel("length of the context, tokens")
    shrink = min(1.0, 4.0 / height)
    bar = figure.colorbar(
        image, ax=list(panels), ticks=[0, 0.5, 1], format=lambda value, _: f"{100 * value:.0f}",
        fraction=0.03, pad=0.02, shrink=shrink, anchor=(0.0, 1.0),
        aspect=max(8, 4 * height * shrink),
    )  # fmt: skip
    bar.outline.set_visible(False)  # type: ignore[operator]
    _save(figure, path)


def _heat(axes: Axes, report: Report, lengths: Sequence[str], small: bool) -> Any:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    scale, tasks = colormaps[_SCALE], report.tasks
    found = {(cell.task, cell.length): cell for cell in report.cells}
    table = [
        [found[t, x].accuracy if (t, x) in found else float("nan") for x in lengths] for t in tasks
    ]
    image = axes.imshow(table or [[float("nan")]], cmap=scale, vmin=0.0, vmax=1.0, aspect="auto")
    for row, task in enumerate(tasks):
        for column, length in enumerate(lengths):
            cell = found.get((task, length))
            if cell is None:
                if length in report.skipped.get(task, {}):
                    box = Rectangle(
                        (column - 0.5, row - 0.5), 1, 1,
                        facecolor="#E4E4E4", edgecolor="#B0B0B0", hatch="///", linewidth=0,
                    )  # fmt: skip
                    axes.add_patch(box)
                continue
            colour = _ink(scale(cell.accuracy))
            at = row - (0.17 if small else 0)
            text = _percent(cell.accuracy)
            axes.text(column, at, text, ha="center", va="center", color=colour, fontsize=10)
            if small:
                low, high = cell.interval
                note = f"{100 * low:.0f}-{100 * high:.0f}  n {_count(cell.samples)}"
                axes.text(
                    column, row + 0.25, note, ha="center", va="center", color=colour, fontsize=7.2
                )
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(tasks)), [_plain(task, 24) for task in tasks])
    axes.set_xticks([x + 0.5 for x in range(len(lengths) - 1)], minor=True)
    axes.set_yticks([y + 0.5 for y in range(len(tasks) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def plot_lines(
    reports: Mapping[str, Report],
    path: str | os.PathLike[str],
    chance: float | None = None,
    task: str | None = None,
    guess: str = "guessing",
) -> None:
    """Draw accuracy against length, one line per run with 95% intervals: of `task`, or the mean over tasks.

    `chance` is what guessing scores, drawn as a dotted line named `guess`. A hollow marker is a mean
    over fewer tasks than the run has, as some could not be run there.
    """
    if not reports:
        raise ValueError("reports is empty; give at least one {name: report}")
    if task is not None and not any(task in report.tasks for report in reports.values()):
        raise ValueError(f"task={task!r} is in none of the reports; name a task that was evaluated")
    runs = {n: r if task is None else r.only([task]) for n, r in reports.items()}
    lengths = sorted({x for r in runs.values() for x in r.lengths}, key=parse_length)
    figure = _figure(8.5, 4.4)
    axes = figure.subplots()
    last: dict[str, float] = {}
    for number, (name, report) in enumerate(runs.items()):
        has = [length for length in report.lengths if report.at(length)]
        if not has:
            continue
        at = [lengths.index(length) + _dodge(number, len(runs)) for length in has]
        shares = [report.mean(length) for length in has]
        bounds = [report.mean_interval(length) for length in has]
        _line(axes, number, at, shares, bounds)
        hollow = [i for i, x in enumerate(has) if len(report.at(x)) < len(report.tasks)]
        axes.plot(
            [at[i] for i in hollow], [100 * shares[i] for i in hollow],
            **(_style(number) | {"linestyle": "none", "markerfacecolor": "white", "zorder": 5}),
        )  # fmt: skip
        last[name] = shares[-1]
    if chance is not None:
        _guess_line(axes, chance, guess)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_xlim(-0.4, max(len(lengths) - 0.6, 0.4))
    axes.set_xlabel("length of the context, tokens")
    _percent_axis(axes)
    if task is not None:
        axes.set_title(_plain(task), loc="left", fontsize=11)
    elif any(len(report.tasks) > 1 for report in runs.values()):
        axes.set_title("mean over tasks", loc="left", fontsize=11)
    # In the order in which the lines end, so that the legend reads like labels at the lines.
    _legend(figure, runs, sorted(last, key=lambda name: -last[name]))
    _save(figure, path)


def depths(rows: Sequence[Mapping[str, Any]], bins: int = DEPTH_BINS) -> list[AccuracyBin]:
    """Count right answers by where in the document the earliest supporting fact stands.

    Positions are fractions of the document, in `bins` of equal width; an empty one is left out. Rows
    without `supporting`, `fact_offsets` or `tokens`, and those of facts alone (0k), are left out.
    """
    counts: dict[int, list[int]] = {}
    for at, tokens, right in _places(rows):
        count = counts.setdefault(min(bins - 1, at * bins // tokens), [0, 0])
        count[0] += right
        count[1] += 1
    return [AccuracyBin(i / bins, (i + 1) / bins, *counts[i]) for i in sorted(counts)]


def distances(rows: Sequence[Mapping[str, Any]], factor: int | None = None) -> list[AccuracyBin]:
    """Count right answers by how many tokens before the end the earliest supporting fact stands.

    Bins are `factor` times as wide from one to the next, by default 2, or 4 where that makes more than
    a dozen; the first is from 0 to NEAR.
    """
    places = [(tokens - at, right) for at, tokens, right in _places(rows)]
    if not places:
        return []
    octaves = [(distance // NEAR).bit_length() for distance, _ in places]
    if factor is None:
        factor = 2 if max(octaves) - min(octaves) < 12 else 4
    step = factor.bit_length() - 1
    counts: dict[int, list[int]] = {}
    for octave, (_, right) in zip(octaves, places, strict=True):
        count = counts.setdefault(-(-octave // step), [0, 0])
        count[0] += right
        count[1] += 1
    edges = [0.0, *(float(NEAR * factor**i) for i in range(max(counts) + 1))]
    return [AccuracyBin(edges[i], edges[i + 1], *counts[i]) for i in sorted(counts)]


def plot_depth(
    rows: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]
) -> bool:
    """Draw accuracy against where the fact stands, one line per run; False, and no file, without such rows.

    Where documents differ in length, a second panel shows the distance from the fact to the end.
    """
    by_depth = {name: depths(some) for name, some in rows.items()}
    if not any(by_depth.values()):
        return False
    sizes = {tokens for some in rows.values() for _, tokens, _ in _places(some)}
    both = max(sizes) >= 1.5 * min(sizes)
    figure = _figure(8.5, 7.2 if both else 4.0)
    panels = figure.subplots(2 if both else 1, 1, squeeze=False)[:, 0]
    _bins_panel(panels[0], by_depth)
    panels[0].set_xlabel("where the earliest supporting fact stands: 0 is the beginning, 1 the end")
    edges = [number / DEPTH_BINS for number in range(DEPTH_BINS)]
    _bin_ticks(
        panels[0], by_depth, edges, [f"{edge:g}-{edge + 1 / DEPTH_BINS:g}" for edge in edges]
    )
    if both:
        whole = {name: distances(some) for name, some in rows.items()}
        coarse = any(b.low and b.high == 4 * b.low for some in whole.values() for b in some)
        by_distance = {name: distances(some, 4 if coarse else 2) for name, some in rows.items()}
        low = min(b.low for some in by_distance.values() for b in some)
        high = max(b.high for some in by_distance.values() for b in some)
        edges = []
        while low < high:
            edges.append(low)
            low = low * (4 if coarse else 2) if low else float(NEAR)
        _bins_panel(panels[1], by_distance, edges)
        panels[1].set_xlabel("tokens from that fact to the end of the document, at least")
        _bin_ticks(panels[1], by_distance, edges, [_tokens(edge) for edge in edges])
    _legend(figure, rows, [name for name, some in by_depth.items() if some])
    _save(figure, path)
    return True


def _places(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, bool]]:
    """The position of the earliest supporting fact, the document's tokens, and whether it was right."""
    found = []
    for row in rows:
        offsets, tokens = row.get("fact_offsets"), row.get("tokens")
        if not offsets or not tokens or parse_length(row["length"]) == 0:
            continue
        places = [offsets[i] for i in row.get("supporting") or () if 0 <= i < len(offsets)]
        if places and 0 <= (at := min(places)) < tokens:
            found.append((int(at), int(tokens), bool(row["correct"])))
    return found


def _bins_panel(
    axes: Axes, runs: Mapping[str, Sequence[AccuracyBin]], edges: Sequence[float] | None = None
) -> None:
    for number, bins in enumerate(runs.values()):
        if not bins:
            continue
        places = [round(b.low * DEPTH_BINS) if edges is None else edges.index(b.low) for b in bins]
        at = [place + _dodge(number, len(runs)) for place in places]
        shares = [b.correct / b.samples for b in bins]
        bounds = [wilson(b.correct, b.samples) for b in bins]
        # A line across an empty bin would claim what nobody measured.
        for i in reversed(range(1, len(bins))):
            if places[i] > places[i - 1] + 1:
                at.insert(i, math.nan)
                shares.insert(i, math.nan)
                bounds.insert(i, (math.nan, math.nan))
        _line(axes, number, at, shares, bounds)
    _percent_axis(axes)


def _bin_ticks(
    axes: Axes,
    runs: Mapping[str, Sequence[AccuracyBin]],
    edges: Sequence[float],
    names: Sequence[str],
) -> None:
    """Name the bins, with how many samples every run with any there has at least."""
    labels = []
    for edge, name in zip(edges, names, strict=True):
        counts = [
            sum(b.samples for b in bins if math.isclose(b.low, edge)) for bins in runs.values()
        ]
        some = [count for count in counts if count]
        note = f"n {_count(min(some))}" + "+" * (min(some) < max(some)) if some else ""
        labels.append(f"{name}\n{note}")
    axes.set_xticks(range(len(edges)), labels, fontsize=8.5)
    axes.set_xlim(-0.5, len(edges) - 0.5)


def plot_cost(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Draw tokens per second, peak memory and the share of time spent waiting for data, by length."""
    if not reports:
        raise ValueError("reports is empty; give at least one {name: report}")
    lengths = sorted({c.length for r in reports.values() for c in r.cells}, key=parse_length)
    places = _log_places(lengths)
    figure = _figure(8.5, 8.0)
    panels = figure.subplots(3, 1, sharex=True)
    for number, report in enumerate(reports.values()):
        lines: list[list[tuple[float, float]]] = [[], [], []]
        for length in lengths:
            if not (cells := report.at(length)):
                continue
            seconds = sum(cell.seconds for cell in cells)
            tokens = sum(cell.tokens for cell in cells)
            memory = max(cell.peak_memory_bytes for cell in cells) / 2**20
            at = places[length]
            # Nothing is drawn for what was not measured: a log axis has no zero.
            if seconds > 0 and tokens > 0:
                lines[0].append((at, tokens / seconds))
            if memory > 0:
                lines[1].append((at, memory))
            if seconds > 0:
                waited = sum(cell.data_seconds for cell in cells)
                lines[2].append((at, 100 * waited / seconds))
        for axes, points in zip(panels, lines, strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), **_style(number))
    titles = ("tokens of context per second", "peak memory, MiB", "time waiting for data, %")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.3)
        _hide_upper_and_right_frame(axes)
        if axes is not panels[2]:
            _log_axis(axes)
    panels[2].set_ylim(0, max(10.0, panels[2].get_ylim()[1]))
    ticks = _lengths_with_room_for_labels(lengths, places)
    panels[2].set_xticks([places[length] for length in ticks], ticks)
    if len(lengths) == 1:
        panels[2].set_xlim(places[lengths[0]] - 1, places[lengths[0]] + 1)
    panels[2].set_xlabel("length of the context, tokens (log scale)")
    _legend(figure, reports, list(reports))
    _save(figure, path)


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    points: list[float] = [float(y) for line in axes.get_lines() for y in _values(line)]
    if not points:
        return
    low, high = min(points), max(points)
    axes.set_yscale("log")
    # Room around the lines: equal costs should not look like a cliff drawn at a large scale.
    middle, half = math.sqrt(low * high), max(2.0, math.sqrt(high / low) * 1.3)
    axes.set_ylim(middle / half, middle * half)
    wide = half > 30
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1,) if wide else (1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))


def _values(line: Any) -> Sequence[float]:
    return list(line.get_ydata())


def _log_places(lengths: Sequence[str]) -> dict[str, float]:
    """Places on a log axis; 0k stands a step before the shortest other length."""
    tokens = {length: parse_length(length) for length in lengths}
    shortest = min((count for count in tokens.values() if count), default=2)
    return {
        length: math.log2(count) if count else math.log2(shortest) - 1.5
        for length, count in tokens.items()
    }


def _lengths_with_room_for_labels(lengths: Sequence[str], places: Mapping[str, float]) -> list[str]:
    """The lengths that are labelled, so far apart that no two labels touch."""
    span = max(places.values(), default=0) - min(places.values(), default=0)
    kept: list[str] = []
    for length in lengths:
        if not kept or places[length] - places[kept[-1]] > 0.05 * span:
            kept.append(length)
    return kept


def _line(
    axes: Axes,
    number: int,
    at: Sequence[float],
    shares: Sequence[float],
    bounds: Sequence[tuple[float, float]],
) -> None:
    below = [100 * max(0.0, s - low) for s, (low, _) in zip(shares, bounds, strict=True)]
    above = [100 * max(0.0, high - s) for s, (_, high) in zip(shares, bounds, strict=True)]
    axes.errorbar(
        at, [100 * share for share in shares], yerr=[below, above],
        capsize=3, elinewidth=1, **_style(number),
    )  # fmt: skip


def _guess_line(axes: Axes, chance: float, name: str) -> None:
    from matplotlib.transforms import blended_transform_factory

    axes.axhline(100 * chance, color=_GREY, linestyle=":", linewidth=1.2, zorder=1)
    axes.text(
        0.005, 100 * chance + 1, f"{name} {_percent(chance)}%",
        transform=blended_transform_factory(axes.transAxes, axes.transData),
        color=_GREY, fontsize=8.5, va="bottom", zorder=1,
    )  # fmt: skip


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy, %")
    axes.grid(axis="y", alpha=0.3)
    _hide_upper_and_right_frame(axes)


def _hide_upper_and_right_frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _style(number: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": 1.6,
        "markersize": 6,
        "markeredgecolor": _COLOURS[number % len(_COLOURS)],
    }


def _dodge(number: int, runs: int) -> float:
    """How far a run is drawn from the tick, so that the intervals of several do not cover each other."""
    return (number - (runs - 1) / 2) * min(0.09, 0.5 / runs)


def _legend(figure: Figure, runs: Mapping[str, Any], shown: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    if len(runs) < 2:
        return
    numbers = {name: number for number, name in enumerate(runs)}
    # Marker and dashes both: the handle must be long enough to show them.
    handles = [Line2D([], [], **_style(numbers[name])) for name in shown]
    figure.legend(
        handles, [_wrap(name) for name in shown], loc="outside right upper",
        frameon=False, handlelength=4, fontsize=10,
    )  # fmt: skip


def _wrap(name: str) -> str:
    import textwrap

    # matplotlib leaves out labels that begin with an underscore.
    name = f" {name}" if name.startswith("_") else name
    return "\n".join(textwrap.wrap(_plain(name), 22, max_lines=3)) or " "


def _plain(text: str, longest: int = 60) -> str:
    """Text that matplotlib draws as it stands: in one line, without formulas, and not longer."""
    text = " ".join(text.encode("utf-8", "replace").decode().split())
    text = text if len(text) <= longest else text[: longest - 3] + "..."
    return text.replace("$", r"\$")


def _ink(colour: tuple[float, ...]) -> str:
    """Black or white, whichever stands out from `colour` by its luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return (
        "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "white"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}".removesuffix(".0")


def _tokens(edge: float) -> str:
    return format_length(int(edge)) if edge else "0"


def _count(samples: int) -> str:
    return str(samples) if samples < 10_000 else f"{samples // 1000}k"


def _figure(width: float, height: float) -> Figure:
    # Without pyplot, which would look for a window system and keep a global figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the tables have it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
