"""A report about one or more runs: pictures, tables to paste, and a page to open in a browser.

The page is one file without scripts; all text that comes from data is escaped.
"""

from __future__ import annotations

import base64
import html
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlm.eval.reporting.plots import plot_cost, plot_depth, plot_heat_map, plot_lines
from memlm.eval.reporting.report import (
    Cell,
    Report,
    escape_cell,
    load_rows,
    percent,
    percent_range,
)
from memlm.eval.running.log import SAMPLES, Row
from memlm.retrieval.embedders import HashingEmbedder
from memlm.tasks.babilong import parse_length

HEAT, LINES, DEPTH, COST = "accuracy.png", "lengths.png", "depth.png", "cost.png"
MARKDOWN, PAGE = "report.md", "report.html"
# Of a task in a run: as many wrong answers as show a pattern without burying the page.
WRONG_SHOWN = 3
# Settings that follow from the others, from the model or from its tokenizer. All the rest are options of
# `memlm eval` by their own names, so that a new one is in a command that repeats a run unless it is here.
DERIVED = (
    "model", "haystack_digest", "stories_digest", "prompt_digest", "recall_template", "command",
)  # fmt: skip
# Settings that are options by other names; a file of prompts decides their style.
RENAMED = {
    "retrieval.k": "retrieval",
    "retrieval.size": "chunk_size",
    "retrieval.hops": "hops",
    "prompt_file": "prompt",
}
# What `evaluate` can be told and the command cannot, with what the command does.
IN_PYTHON = {
    "split": "eval",
    "embedder": HashingEmbedder().fingerprint,
    "retrieval.overlap": 0,
    "retrieval.by": "sentences",
    "retrieval.where": None,
}
# Fewer distinct questions than this do not say how often the commonest answer is right.
GUESS_QUESTIONS = 30
TEXT_SHOWN = 300
MEAN_NOTE = (
    "A mean weighs every task the same; its interval adds the squared distances of each task's accuracy "
    "to its Wilson limits like variances (square-and-add). All intervals are 95%."
)


def write_report(
    runs: Mapping[str, str | os.PathLike[str] | Report],
    out: str | os.PathLike[str],
    *,
    chance: float | None = None,
    title: str = "Accuracy by length of context",
) -> list[Path]:
    """Write pictures, `report.md` and `report.html` about `runs` into the folder `out`; return their paths.

    A run is the folder of an evaluation or a Report; without a folder there are no samples to draw depths
    or show wrong answers from. `chance` is what guessing scores, by default what the commonest answer of
    each task would score on the samples, where these are enough to say.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one {name: folder}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={os.fspath(out)!r} is a file; name a folder")
    loaded = [_Run.load(name, run) for name, run in runs.items()]
    story = _Story(title, loaded, chance)
    folder.mkdir(parents=True, exist_ok=True)
    plot_heat_map({run.name: run.report for run in loaded}, folder / HEAT)
    plot_lines(story.shared, folder / LINES, story.chance, guess=story.guess)
    pictures = [HEAT, LINES]
    if plot_depth({run.name: run.rows for run in loaded}, folder / DEPTH):
        pictures.append(DEPTH)
    else:
        # One of an earlier report would be taken for this one's.
        (folder / DEPTH).unlink(missing_ok=True)
    plot_cost({run.name: run.report for run in loaded}, folder / COST)
    pictures.append(COST)
    _write(folder / MARKDOWN, _markdown(story, pictures))
    images = {name: (folder / name).read_bytes() for name in pictures}
    _write(folder / PAGE, _html(story, images))
    return [folder / name for name in [*pictures, MARKDOWN, PAGE]]


@dataclass(frozen=True)
class _Run:
    """A run with its samples, of the cells its summary has."""

    name: str
    report: Report
    rows: list[Row]

    @classmethod
    def load(cls, name: str, run: str | os.PathLike[str] | Report) -> _Run:
        if isinstance(run, Report):
            return cls(name, run, [])
        report = Report.load(run)
        rows = load_rows(run) if (Path(run) / SAMPLES).exists() else []
        # The folder may hold samples of earlier calls, which the summary is not about.
        counts = {(cell.task, cell.length): cell.samples for cell in report.cells}
        kept = [row for row in rows if row["index"] < counts.get((row["task"], row["length"]), 0)]
        return cls(name, report, kept)

    def wrong(self, task: str) -> list[Row]:
        """Wrong answers of a task, of different lengths as far as there are."""
        rows = [row for row in self.rows if row["task"] == task and not row["correct"]]
        rows.sort(key=lambda row: (parse_length(row["length"]), row["index"]))
        rank: Counter[str] = Counter()
        ranked: list[tuple[int, int, Row]] = []
        for row in rows:
            ranked.append((rank[row["length"]], len(ranked), row))
            rank[row["length"]] += 1
        return [row for _, _, row in sorted(ranked, key=lambda item: item[:2])[:WRONG_SHOWN]]

    @property
    def commands(self) -> list[str]:
        """The commands that repeat the run, one for every number of samples; none without settings."""
        settings = self.report.settings
        if isinstance(settings.get("command"), str):
            return [settings["command"]]
        if not settings:
            return []
        lengths: dict[int, list[str]] = {}
        for length in self.report.lengths:
            if cells := self.report.at(length):
                lengths.setdefault(max(cell.samples for cell in cells), []).append(length)
        commands = []
        for samples, some in lengths.items():
            tasks = [t for t in self.report.tasks if any(self.report.cell(t, x) for x in some)]
            words = ["memlm", "eval", "MODEL", "--tasks", *tasks, "--lengths", *some]
            words += ["--samples", str(samples)]
            options, beyond = _options(settings)
            for key, value in options.items():
                values = value if isinstance(value, list | tuple) else [value]
                words += ["--" + key.replace("_", "-"), *map(_text, values)]
            command = shlex.join([*words, "--out", self.name])
            if beyond:
                said = ", ".join(f"{key}={value!r}" for key, value in beyond.items())
                command += f"  # and from Python, as the command cannot say it: {said}"
            commands.append(command)
        return commands


def _options(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's settings as options of `memlm eval`, and those it has no option for."""
    options: dict[str, Any] = {}
    beyond: dict[str, Any] = {}
    for key, value in sorted(_flat(settings).items()):
        if key in IN_PYTHON or ("." in key and key not in RENAMED):
            if value != IN_PYTHON.get(key):
                beyond[key] = value
        # A model's own memory is no baseline to name.
        elif value not in (None, "") and (key, value) != ("baseline", "memory"):
            options[RENAMED.get(key, key)] = value
    return options, beyond


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is not derived, settings within a setting by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{part}": inner for part, inner in value.items()}
        elif key not in DERIVED:
            flat[key] = value
    return flat


class _Story:
    """What a report tells: the runs, on what they can be compared, and the answer in a sentence."""

    def __init__(self, title: str, runs: Sequence[_Run], chance: float | None) -> None:
        self.title = title
        self.runs = runs
        reports = {run.name: run.report for run in runs}
        every = list(dict.fromkeys(task for run in runs for task in run.report.tasks))
        common = [task for task in every if all(task in r.tasks for r in reports.values())]
        # Means over different tasks are no comparison, so they are over the tasks all runs share.
        self.tasks = common or every
        self.comparable = bool(common)
        self.left_out = [task for task in every if task not in self.tasks]
        self.shared = {name: r.only(common) if common else r for name, r in reports.items()}
        found = {length for r in self.shared.values() for length in r.lengths}
        self.lengths = sorted(found, key=parse_length)
        self.guess = "guessing"
        self.chance = chance
        if chance is None:
            self.chance, self.guess = self._commonest(), "always the commonest answer:"

    def _commonest(self) -> float | None:
        """How often the commonest answer of each task is right, over all tasks."""
        shares = []
        for task in self.tasks:
            targets = {
                # The same question at another length is the same question.
                row["index"]: row["target"]
                for run in self.runs
                for row in run.rows
                if row["task"] == task and row.get("target") is not None
            }
            if len(targets) < GUESS_QUESTIONS:
                return None
            shares.append(max(Counter(targets.values()).values()) / len(targets))
        return sum(shares) / len(shares) if shares else None

    @property
    def over(self) -> str:
        """What a mean is over, in words."""
        if len(self.tasks) == 1:
            return f"accuracy on {self.tasks[0]}"
        tasks = ", ".join(self.tasks) if len(self.tasks) <= 6 else f"{len(self.tasks)} tasks"
        return f"the mean over {tasks}"

    def answer(self) -> str:
        """The result in a sentence: which run is best, and at which lengths."""
        # A mean that lacks a task is no match for one that has it.
        scores = {
            length: {
                name: report.mean(length)
                for name, report in self.shared.items()
                if report.at(length) and len(report.at(length)) == len(report.tasks)
            }
            for length in self.lengths
        }
        scores = {length: found for length, found in scores.items() if found}
        if not scores:
            return "No run has every task at any length."
        if len(self.runs) == 1:
            name, report = next(iter(self.shared.items()))
            has = list(scores)
            text = f"{_quoted(name)} answers {percent(report.mean(has[0]))}% right at {has[0]}"
            if len(has) > 1:
                text += f" and {percent(report.mean(has[-1]))}% at {has[-1]}"
            return f"{text} ({self.over})."
        if not self.comparable:
            return "The runs share no task, so their means cannot be compared."
        return self._contest(scores)

    def _contest(self, scores: Mapping[str, Mapping[str, float]]) -> str:
        """Say who leads at which lengths, in stretches, and where the lead is beyond doubt."""
        stretches: list[tuple[list[str], bool, list[str]]] = []
        clear = []
        for length, found in scores.items():
            best = max(found.values())
            leaders = [name for name, score in found.items() if score == best]
            alone = len(found) == 1
            if not stretches or stretches[-1][:2] != (leaders, alone):
                stretches.append((leaders, alone, []))
            stretches[-1][2].append(length)
            bounds = {name: self.shared[name].mean_interval(length) for name in found}
            others = [bounds[name][1] for name in found if name != leaders[0]]
            if others and bounds[leaders[0]][0] > max(others):
                clear.append(length)
        parts = []
        for leaders, alone, where in stretches:
            ends = [percent(max(scores[x].values())) for x in (where[0], where[-1])]
            span = f"{ends[0]}%" if len(where) == 1 else f"{ends[0]}% to {ends[1]}%"
            verb = "is alone" if alone else "leads" if len(leaders) == 1 else "tie"
            parts.append(f"{' and '.join(map(_quoted, leaders))} {verb} at {_span(where)} ({span})")
        text = f"By {self.over}, {', '.join(parts)}"
        if clear:
            text += f"; the lead exceeds the 95% intervals at {_spans(clear, list(scores))}"
        elif not all(alone for _, alone, _ in stretches):
            text += "; no lead exceeds the 95% intervals"
        return text + "."

    def captions(self) -> dict[str, tuple[str, str]]:
        """A heading and a line on how to read it, for every picture."""
        lines = f"Each point is {self.over} with its 95% interval."
        if any(
            len(r.at(x)) not in (0, len(r.tasks)) for r in self.shared.values() for x in r.lengths
        ):
            lines += " Hollow points lack some of the tasks."
        if self.left_out:
            lines += f" Tasks that not every run has are left out: {', '.join(self.left_out)}."
        if not self.comparable:
            lines = "The runs share no task: each line is the mean over its own, so do not compare them."
        return {
            HEAT: (
                "Accuracy by task and length",
                "Percent right; below it the 95% interval and n, the samples. Light is right, dark is "
                "wrong, hatched could not be run, white was not asked for.",
            ),
            LINES: ("Accuracy against length", lines),
            DEPTH: (
                "Accuracy against where the fact stands",
                "All tasks and lengths but 0k together, by the earliest fact that the answer needs. A "
                "level line means that place does not matter; n is the samples of a bin, with + where "
                "another run has more.",
            ),
            COST: (
                "What it costs",
                "A level memory line means that longer documents need no more memory. Peak memory is of "
                "the GPU where there is one, otherwise of the whole process.",
            ),
        }


NO_DEPTH = "Not drawn: no sample says which facts support its answer (older runs do not)."


def _markdown(story: _Story, pictures: Sequence[str]) -> str:
    captions = story.captions()
    lines = [f"# {escape_cell(story.title)}", "", escape_cell(story.answer()), ""]
    if len(story.runs) > 1:
        lines += [f"## {escape_cell(_capital(story.over))}", "", _means_table(story), ""]
    for run in story.runs:
        lines += [f"## {escape_cell(run.name)}", "", run.report.to_markdown(intervals=True), ""]
    lines += ["Percent right, with the 95% interval. " + MEAN_NOTE, ""]
    for name, (heading, caption) in captions.items():
        drawn = name in pictures
        lines += [f"## {heading}", ""]
        lines += (
            [f"![{heading}]({name})", "", escape_cell(caption), ""] if drawn else [NO_DEPTH, ""]
        )
    lines += ["## Settings and versions", "", _settings_table(story.runs), ""]
    commands = [command for run in story.runs for command in run.commands]
    if commands:
        lines += ["## To repeat", "", *(f"    {' '.join(c.splitlines())}" for c in commands), ""]
    return "\n".join(lines)


def _means_table(story: _Story) -> str:
    lines = [
        "| run | " + " | ".join(story.lengths) + " |",
        "|---" * (1 + len(story.lengths)) + "|",
    ]
    for name, report in story.shared.items():
        row = []
        for length in story.lengths:
            if found := report.at(length):
                entry = percent_range(report.mean(length), report.mean_interval(length))
                row.append(entry + "*" * (len(found) < len(report.tasks)))
            else:
                row.append("-" if _reasons(report, length) else "")
        lines.append(f"| {escape_cell(name)} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _settings_table(runs: Sequence[_Run]) -> str:
    lines = [
        "| | " + " | ".join(escape_cell(run.name) for run in runs) + " |",
        "|---" * (1 + len(runs)) + "|",
    ]
    for key, values in _settings(runs):
        lines.append(f"| {escape_cell(key)} | " + " | ".join(map(escape_cell, values)) + " |")
    return "\n".join(lines)


def _settings(runs: Sequence[_Run]) -> list[tuple[str, list[str]]]:
    """Rows of settings, then versions, a column a run; empty where a run has none."""
    rows = []
    for tables in ([r.report.settings for r in runs], [r.report.versions for r in runs]):
        for key in dict.fromkeys(key for table in tables for key in table):
            rows.append((str(key), [_text(table.get(key, "")) for table in tables]))
    return rows


def _html(story: _Story, images: Mapping[str, bytes]) -> str:
    parts = [f"<h1>{_e(story.title)}</h1>", f'<p class="answer">{_e(story.answer())}</p>']
    parts += [_figure(story, name, images.get(name)) for name in (LINES, HEAT, DEPTH, COST)]
    parts.append("<h2>Tables</h2>")
    if len(story.runs) > 1:
        parts += [f"<h3>{_e(_capital(story.over))}</h3>", _means_html(story)]
    parts += [_cells_html(run) for run in story.runs]
    parts.append(f'<p class="note">Percent right, below it the 95% interval. {_e(MEAN_NOTE)}</p>')
    parts += ["<h2>Some wrong answers</h2>", _wrong_html(story.runs)]
    parts += ["<h2>Settings and versions</h2>", _settings_html(story.runs)]
    commands = [command for run in story.runs for command in run.commands]
    if commands:
        text = "\n".join(commands)
        parts += ["<h2>To repeat</h2>", f"<pre><code>{_e(text)}</code></pre>"]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(story.title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _figure(story: _Story, name: str, image: bytes | None) -> str:
    heading, caption = story.captions()[name]
    if image is None:
        return f"<h2>{_e(heading)}</h2>\n<p>{_e(NO_DEPTH)}</p>"
    data = base64.b64encode(image).decode()
    runs = ", ".join(run.name for run in story.runs)
    alt = f"{heading}, of {runs}. The figures are in the tables below."
    return (
        f"<h2>{_e(heading)}</h2>\n<figure>"
        f'<img alt="{_e(alt)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_e(caption)}</figcaption></figure>"
    )


def _means_html(story: _Story) -> str:
    rows = []
    for name, report in story.shared.items():
        cells = []
        for length in story.lengths:
            if found := report.at(length):
                right, all_ = sum(c.correct for c in found), sum(c.samples for c in found)
                cells.append(
                    _score(
                        report.mean(length), report.mean_interval(length),
                        f"{len(found)} of {len(report.tasks)} tasks, {right} of {all_} samples right",
                        "*" * (len(found) < len(report.tasks)),
                    )
                )  # fmt: skip
            else:
                cells.append(_gap(_reasons(report, length)))
        rows.append(f"<tr><th scope=row>{_e(name)}</th>{''.join(cells)}</tr>")
    return _table(["run", *story.lengths], rows)


def _cells_html(run: _Run) -> str:
    report = run.report
    rows = []
    for task in report.tasks:
        cells = []
        for length in report.lengths:
            cell = report.cell(task, length)
            reason = report.skipped.get(task, {}).get(length)
            cells.append(_gap([reason] if reason else []) if cell is None else _cell(cell))
        rows.append(f"<tr><th scope=row>{_e(task)}</th>{''.join(cells)}</tr>")
    notes = "".join(f'<p class="note">{_e("- " + note)}</p>' for note in report.skipped_notes())
    return f"<h3>{_e(run.name)}</h3>{_table(['task', *report.lengths], rows)}{notes}"


def _cell(cell: Cell) -> str:
    return _score(cell.accuracy, cell.interval, f"{cell.correct} of {cell.samples} right")


def _score(share: float, bounds: tuple[float, float], counts: str, mark: str = "") -> str:
    span = f"{percent(bounds[0])}&ndash;{percent(bounds[1])}"
    return (
        f'<td class="score" style="--share:{100 * share:.1f}%" '
        f'title="{_e(counts)}, 95% interval {span}">'
        f"{percent(share)}{mark}<small>{span}</small></td>"
    )


def _gap(reasons: Iterable[str]) -> str:
    text = "; ".join(reasons)
    return f'<td class="gap" title="{_e(text)}">-</td>' if text else "<td></td>"


def _wrong_html(runs: Sequence[_Run]) -> str:
    parts = []
    for run in runs:
        rows = []
        for task in run.report.tasks:
            for row in run.wrong(task):
                texts = [_text(row.get(key, "")) for key in ("question", "target", "output")]
                cells = "".join(f"<td>{_e(_cut(text))}</td>" for text in texts)
                name, length, index = _e(task), _e(row["length"]), _e(str(row["index"]))
                rows.append(
                    f"<tr><th scope=row>{name}</th><td>{length}</td><td>{index}</td>{cells}</tr>"
                )
        if not run.rows:
            said = "<p>No samples at hand.</p>"
        elif not rows:
            said = "<p>None: every answer is right.</p>"
        else:
            heads = ["task", "length", "sample", "question", "right answer", "answered"]
            said = _table(heads, rows, "text")
        summary = f"{_e(run.name)}: {len(rows)} shown" if rows else _e(run.name)
        parts.append(f"<details><summary>{summary}</summary>{said}</details>")
    return "\n".join(parts)


def _settings_html(runs: Sequence[_Run]) -> str:
    rows = [
        f"<tr><th scope=row>{_e(key)}</th>{''.join(f'<td>{_e(_cut(v))}</td>' for v in values)}</tr>"
        for key, values in _settings(runs)
    ]
    return _table(["", *(run.name for run in runs)], rows, "text")


def _table(heads: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    head = "".join(f"<th scope=col>{_e(name)}</th>" for name in heads)
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _reasons(report: Report, length: str) -> list[str]:
    found = [reasons[length] for reasons in report.skipped.values() if length in reasons]
    return list(dict.fromkeys(found))


def _spans(lengths: Sequence[str], order: Sequence[str]) -> str:
    """Lengths in words, neighbours in `order` joined: "4k to 64k and 1M"."""
    runs: list[list[str]] = []
    for length in lengths:
        if runs and order.index(length) == order.index(runs[-1][-1]) + 1:
            runs[-1].append(length)
        else:
            runs.append([length])
    return ", ".join(_span(run) for run in runs)


def _span(lengths: Sequence[str]) -> str:
    if len(lengths) < 3:
        return " and ".join(lengths)
    return f"{lengths[0]} to {lengths[-1]}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 3] + "..."


def _quoted(name: str) -> str:
    # A run named "none" would turn the sense of a sentence about.
    return f'"{name}"'


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _write(path: Path, text: str) -> None:
    from memlm.files import write_atomically

    # What is no text, such as half of a surrogate pair in an output, must not stop a report.
    content = text.encode("utf-8", "replace")
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5a5a5a; --page: #ffffff; --rule: #d8d8d8;
  --bar: #0072b2b0; --card: #f6f6f4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a8a8a8; --page: #16181a; --rule: #3c4044; --bar: #56b4e9b0;
    --card: #22262a; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; }
.answer { font-size: 1.15rem; max-width: 48rem; overflow-wrap: anywhere; }
figure { margin: 0; }
/* Pictures are dark on white in either scheme. */
figure img { display: block; max-width: 100%; height: auto; box-sizing: border-box; background: #fff;
  border: 1px solid var(--rule); border-radius: 6px; padding: .6rem; }
figcaption, .note { color: var(--soft); font-size: .9rem; margin: .5rem 0 0; max-width: 48rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
th:first-child, .text th, .text td { text-align: left; }
thead th { font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
td small { display: block; color: var(--soft); font-size: .75rem; white-space: nowrap; }
td.score { padding-bottom: .45rem; background: linear-gradient(to right, var(--bar) var(--share),
  transparent var(--share)) no-repeat left bottom / calc(100% - 6px) 4px; }
td.gap { color: var(--soft); text-align: center; }
.text td { overflow-wrap: anywhere; min-width: 3.2rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@page { margin: 15mm; }
@media print {
  :root { --ink: #000; --soft: #444; --page: #fff; --rule: #bbb; --card: #fff; }
  body { font-size: 11pt; }
  main { max-width: none; padding: 0; }
  figure, tr, pre { break-inside: avoid; }
  h2, h3, summary { break-after: avoid; }
  figure img { max-height: 23cm; border: 0; padding: 0; }
  .wide { overflow: visible; }
  th, td { padding: .15rem .35rem; font-size: 9pt; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
