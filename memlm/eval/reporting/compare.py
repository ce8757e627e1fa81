"""Compare two runs on the very same samples: differences, how sure they are, and what that means.

The unit is the pair: one sample, answered by both. Only pairs that just one run answers rightly tell the
runs apart, so comparing pairs shows smaller differences than comparing two tables does.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memlm.eval.log import Row, recorded
from memlm.eval.reporting.report import escape_cell, load_rows, name_runs, percent
from memlm.eval.statistics import holm, mcnemar, paired_interval, sign_flips
from memlm.tasks.babilong import parse_length

# The keys that make two rows the same sample; one that an older run lacks is not compared.
SAME = ("seed", "question", "target", "fact_offsets", "tokens")
LEVEL = 0.05

METHOD = """\
Differences are B minus A, in percentage points, on samples both runs answered. A cell's interval is \
Tango's 95% score interval for paired proportions, its p McNemar's exact test (two-sided binomial on the \
pairs that one run alone has right), and "p (Holm)" the same corrected for the number of cells. Questions \
are alike at all lengths, so over all cells the samples of one task and index count as one group: p is of \
an exact test that swaps the runs by group, and the interval is widened by the groups' design effect."""


@dataclass(frozen=True)
class PairedCell:
    """Two runs on the same `n` samples: `gained` are right in B alone, `lost` in A alone, `both` in both.

    low, high: 95% interval of the difference, B minus A; p_holm: p corrected for the cells shown.
    """

    task: str
    length: str
    n: int
    both: int
    gained: int
    lost: int
    low: float
    high: float
    p: float
    p_holm: float

    @property
    def accuracy_a(self) -> float:
        return (self.both + self.lost) / self.n

    @property
    def accuracy_b(self) -> float:
        return (self.both + self.gained) / self.n

    @property
    def difference(self) -> float:
        return (self.gained - self.lost) / self.n

    @property
    def significant(self) -> bool:
        return self.p_holm < LEVEL

    def verdict(self, a: str, b: str) -> str:
        """Say in words what the pairs show of runs named `a` and `b`."""
        if self.significant:
            return f"{b if self.difference > 0 else a} is better"
        reach = 100 * max(-self.low, self.high)
        return (
            "no significant difference: a difference of up to "
            f"{reach:.1f} points cannot be excluded"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task, "length": self.length, "n": self.n,
            "accuracy_a": self.accuracy_a, "accuracy_b": self.accuracy_b,
            "both": self.both, "only_a": self.lost, "only_b": self.gained,
            "difference": self.difference, "interval": [self.low, self.high],
            "p": self.p, "p_holm": self.p_holm, "significant": self.significant,
        }  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """Runs `a` and `b` on the samples both have, by cell and over all of them.

    only_in_a, only_in_b: how many samples the other run lacks, which are left out. settings: those that
    differ between the runs, each as (a's, b's), None where a run has no setting of that name.
    """

    a: str
    b: str
    cells: list[PairedCell]
    overall: PairedCell
    only_in_a: int = 0
    only_in_b: int = 0
    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The answer in a sentence."""
        whole, many = self.overall, len(self.cells) > 1
        # In quotes, as a run named "none" would reverse the meaning.
        a, b = f'"{self.a}"', f'"{self.b}"'
        text = (
            f"{whole.verdict(a, b)} (over {_counted(whole.n, 'pair')} in "
            f"{_counted(len(self.cells), 'cell')}: {_points(whole.difference)} points, "
            f"95% interval {_points(whole.low)} to {_points(whole.high)}, p {_p(whole.p)})"
        )
        for run, sign in ((b, 1), (a, -1)):
            found = [
                f"{cell.task} {cell.length}"
                for cell in self.cells
                if cell.significant and sign * cell.difference > 0
            ]
            if found and many:
                more = f" and {len(found) - 6} more" if found[6:] else ""
                text += f"; {run} is better in {', '.join(found[:6])}{more}"
        return text + "."

    def to_markdown(self) -> str:
        """Return the verdict, a table of cells, what was left out, and how it was computed."""
        lines = [
            f"A is {escape_cell(self.a)}, B is {escape_cell(self.b)}: {self.verdict}",
            "",
            "| task | length | pairs | A | B | B - A | 95% interval | A alone | B alone | p | p (Holm)"
            " | verdict |",
            "|---" * 12 + "|",
        ]
        for cell in [*self.cells, *([self.overall] if len(self.cells) > 1 else [])]:
            whole = cell is self.overall
            values = [
                escape_cell(cell.task), cell.length, str(cell.n), percent(cell.accuracy_a),
                percent(cell.accuracy_b), _points(cell.difference),
                f"{_points(cell.low)} to {_points(cell.high)}", str(cell.lost), str(cell.gained),
                _p(cell.p), "" if whole else _p(cell.p_holm), cell.verdict("A", "B").split(":")[0],
            ]  # fmt: skip
            lines.append("| " + " | ".join(values) + " |")
        left_out = [
            f"{_counted(count, 'sample')} only in {name}"
            for count, name in ((self.only_in_a, "A"), (self.only_in_b, "B"))
            if count
        ]
        if left_out:
            lines += ["", "Left out: " + ", ".join(left_out) + "."]
        if self.settings:
            told = [f"{k} ({_short(a)}, {_short(b)})" for k, (a, b) in self.settings.items()]
            lines += ["", "Settings that differ (A, B): " + escape_cell(", ".join(told)) + "."]
        return "\n".join([*lines, "", METHOD])

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "overall": self.overall.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "settings": {key: list(values) for key, values in self.settings.items()},
            "method": METHOD,
        }


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    names: tuple[str, str] | None = None,
) -> Comparison:
    """Compare the runs in folders `a` and `b`, pairing their samples by task, length and index.

    `names` are what to call them, by default after their folders. ValueError where a pair is not the same
    sample, or where there is no pair at all.
    """
    first, second = _by_sample(load_rows(a)), _by_sample(load_rows(b))
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(
            f"a={os.fspath(a)!r} and b={os.fspath(b)!r} share no sample; "
            "evaluate both on the same tasks and lengths"
        )
    _check_same(shared, first, second)
    # Net gains by cell, and over lengths by (task, index).
    outcomes: dict[tuple[str, str], Counter[tuple[bool, bool]]] = defaultdict(Counter)
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for task, length, index in shared:
        right_a = bool(first[task, length, index]["correct"])
        right_b = bool(second[task, length, index]["correct"])
        outcomes[task, length][right_a, right_b] += 1
        groups[task, index].append(right_b - right_a)
    tasks = list(dict.fromkeys(task for task, _ in outcomes))
    order = sorted(outcomes, key=lambda key: (tasks.index(key[0]), parse_length(key[1])))
    p_values = [mcnemar(outcomes[key][False, True], outcomes[key][True, False]) for key in order]
    cells = [
        _cell(*key, outcomes[key], p, corrected)
        for key, p, corrected in zip(order, p_values, holm(p_values), strict=True)
    ]
    name_a, name_b = names or _names(a, b)
    return Comparison(
        name_a,
        name_b,
        cells,
        _overall(cells, list(groups.values())),
        only_in_a=len(first) - len(shared),
        only_in_b=len(second) - len(shared),
        settings=_different(_settings(a), _settings(b)),
    )


def _by_sample(rows: Sequence[Row]) -> dict[tuple[str, str, int], Row]:
    return {(row["task"], row["length"], row["index"]): row for row in rows}


def _settings(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings of a run; none where they are not known, since the pairs are what counts."""
    return recorded(run)


def _different(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    if not a or not b:
        return {}
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    return {key: (a.get(key), b.get(key)) for key in keys}


def _check_same(
    shared: Sequence[tuple[str, str, int]],
    first: dict[tuple[str, str, int], Row],
    second: dict[tuple[str, str, int], Row],
) -> None:
    different = []
    for at in shared:
        one, other = first[at], second[at]
        keys = [k for k in SAME if k in one and k in other and one[k] != other[k]]
        if keys:
            different.append((at, keys[0]))
    if different:
        (task, length, index), key = different[0]
        one, other = first[task, length, index][key], second[task, length, index][key]
        raise ValueError(
            f"{len(different)} of {len(shared)} pairs are not the same sample, the first "
            f"{task} {length} index {index}: {key} is {_short(one)} in a and {_short(other)} in b; "
            "evaluate both with the same seed, stories, haystack and tokenizer"
        )


def _cell(
    task: str, length: str, outcome: Counter[tuple[bool, bool]], p: float, corrected: float
) -> PairedCell:
    gained, lost, n = outcome[False, True], outcome[True, False], sum(outcome.values())
    low, high = paired_interval(gained, lost, n)
    return PairedCell(
        task, length, n, outcome[True, True], gained, lost, low, high, p, corrected
    )  # fmt: skip


def _overall(cells: Sequence[PairedCell], groups: Sequence[Sequence[int]]) -> PairedCell:
    """All pairs together, those of one group taken to depend on each other."""
    n, both = sum(cell.n for cell in cells), sum(cell.both for cell in cells)
    gained, lost = sum(cell.gained for cell in cells), sum(cell.lost for cell in cells)
    mean = (gained - lost) / n
    alone = gained + lost - n * mean * mean
    together = sum((sum(group) - len(group) * mean) ** 2 for group in groups)
    # Where nothing varies, nothing shows how the pairs depend: each group then counts once.
    effect = max(1.0, together / alone) if alone > 1e-9 else n / len(groups)
    low, high = paired_interval(gained / effect, lost / effect, n / effect)
    p = sign_flips([sum(group) for group in groups])
    return PairedCell("all", "all", n, both, gained, lost, low, high, p, p)


def _names(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> tuple[str, str]:
    if Path(a).resolve() == Path(b).resolve():
        return "A", "B"
    one, other = name_runs([a, b])
    return one, other


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text


def _p(p: float) -> str:
    return "<0.0001" if p < 0.0001 else f"{p:.4f}" if p < 0.1 else f"{p:.2f}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
