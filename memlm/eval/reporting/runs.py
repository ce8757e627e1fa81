"""The runs that a report is about: their samples, and the commands that repeat them."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlm.eval.log import SAMPLES, Row
from memlm.eval.reporting.report import Report, load_rows
from memlm.retrieval.embedders import HashingEmbedder
from memlm.tasks.lengths import parse_length

# Wrong answers shown per task of a run: enough to show a pattern without burying the page.
WRONG_SHOWN = 3
# Settings that follow from the others, from the model or from its tokenizer. All the rest are options of
# `memlm eval` by their own names, so that a new one is in a command that repeats a run unless it is here.
DERIVED = (
    "model", "haystack_digest", "haystack_manifest", "stories_digest", "data_digest", "prompt_digest",
    "silenced_by", "recall_template", "command", "schedule", "schedule_measured",
)  # fmt: skip
# Settings that are options by other names; a file of prompts decides their style.
RENAMED = {
    "retrieval.k": "retrieval",
    "retrieval.size": "chunk_size",
    "retrieval.hops": "hops",
    "prompt_file": "prompt",
}
# Settings of `evaluate` that the command has no option for, with the values it uses.
IN_PYTHON = {
    "split": "eval",
    "embedder": HashingEmbedder().fingerprint,
    "retrieval.overlap": 0,
    "retrieval.by": "sentences",
    "retrieval.where": None,
}


@dataclass(frozen=True)
class Run:
    """A run with its samples, those of the cells in its summary."""

    name: str
    report: Report
    rows: list[Row]

    @classmethod
    def load(cls, name: str, run: str | os.PathLike[str] | Report) -> Run:
        if isinstance(run, Report):
            return cls(name, run, [])
        report = Report.load(run)
        rows = load_rows(run) if (Path(run) / SAMPLES).exists() else []
        # The folder may hold samples of earlier calls, which the summary is not about.
        counts = {(cell.task, cell.length): cell.samples for cell in report.cells}
        kept = [row for row in rows if row["index"] < counts.get((row["task"], row["length"]), 0)]
        return cls(name, report, kept)

    def wrong(self, task: str) -> list[Row]:
        """Some wrong answers of a task, of as many lengths as possible."""
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
        if "data_digest" in settings:
            # Own questions have neither tasks nor lengths to choose.
            asked = ["--samples", str(sum(cell.samples for cell in self.report.cells))]
            return [self._command(asked)]
        lengths: dict[int, list[str]] = {}
        for length in self.report.lengths:
            if cells := self.report.at(length):
                lengths.setdefault(max(cell.samples for cell in cells), []).append(length)
        commands = []
        for samples, some in lengths.items():
            tasks = [t for t in self.report.tasks if any(self.report.cell(t, x) for x in some)]
            asked = ["--tasks", *tasks, "--lengths", *some, "--samples", str(samples)]
            commands.append(self._command(asked))
        return commands

    def _command(self, asked: Sequence[str]) -> str:
        """The command that asks what is `asked`, with the run's settings."""
        words = ["memlm", "eval", "MODEL", *asked]
        options, beyond = _options(self.report.settings)
        for key, value in options.items():
            values = value if isinstance(value, list | tuple) else [value]
            words += ["--" + key.replace("_", "-"), *map(as_text, values)]
        command = shlex.join([*words, "--out", self.name])
        if beyond:
            said = ", ".join(f"{key}={value!r}" for key, value in beyond.items())
            command += f"  # and from Python, as the command cannot say it: {said}"
        return command


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
    """Settings that are not derived from others, nested ones under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{part}": inner for part, inner in value.items()}
        elif key not in DERIVED:
            flat[key] = value
    return flat


def as_text(value: Any) -> str:
    """A setting or an answer as it is shown: text as it stands, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
