"""Runs side by side: on which tasks they can be compared, and the answer in a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memlm.eval.reporting.report import Report, percent
from memlm.eval.reporting.runs import Run, as_text
from memlm.tasks.lengths import parse_length

# Fewer distinct questions than this do not say how often the commonest answer is right.
GUESS_QUESTIONS = 30


@dataclass(frozen=True)
class Section:
    """A part of a report that its maker adds: text, and a table below it, which may have no rows."""

    heading: str
    text: str
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


class Findings:
    """What a report says: the runs, on which tasks they can be compared, and the answer in a sentence."""

    def __init__(
        self,
        title: str,
        runs: Sequence[Run],
        chance: float | None,
        sections: Sequence[Section] = (),
    ) -> None:
        self.title = title
        self.runs = runs
        self.sections = sections
        reports = {run.name: run.report for run in runs}
        every = list(dict.fromkeys(task for run in runs for task in run.report.tasks))
        common = [task for task in every if all(task in r.tasks for r in reports.values())]
        # Means over different tasks cannot be compared, so they are over the tasks all runs share.
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
        # A mean that lacks a task cannot be compared with one that has it.
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
            text = f"{quoted_name(name)} answers {percent(report.mean(has[0]))}% right at {has[0]}"
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
            parts.append(
                f"{' and '.join(map(quoted_name, leaders))} {verb} at {_span(where)} ({span})"
            )
        text = f"By {self.over}, {', '.join(parts)}"
        if clear:
            text += f"; the lead exceeds the 95% intervals at {_spans(clear, list(scores))}"
        elif not all(alone for _, alone, _ in stretches):
            text += "; no lead exceeds the 95% intervals"
        return text + "."

    def settings(self) -> list[tuple[str, list[str]]]:
        """Rows of settings, then of versions: one text per run, empty where a run has none."""
        rows = []
        reports = [run.report for run in self.runs]
        for tables in ([r.settings for r in reports], [r.versions for r in reports]):
            for key in dict.fromkeys(key for table in tables for key in table):
                rows.append((str(key), [as_text(table.get(key, "")) for table in tables]))
        return rows

    def commands(self) -> list[str]:
        """The commands that repeat the runs, for those whose settings are known."""
        return [command for run in self.runs for command in run.commands]


def reasons_for_gap(report: Report, length: str) -> list[str]:
    """Why tasks were not run at a length, each reason once."""
    found = [reasons[length] for reasons in report.skipped.values() if length in reasons]
    return list(dict.fromkeys(found))


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def quoted_name(name: str) -> str:
    # A run named "none" would reverse the meaning of a sentence.
    return f'"{name}"'


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
