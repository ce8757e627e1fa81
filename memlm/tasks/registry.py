"""The tasks by name: bAbI's twenty and the probes."""

from __future__ import annotations

import difflib

from memlm.tasks import babi
from memlm.tasks.probes import PROBES, find_probe
from memlm.tasks.scoring import babilong_score, exact_match
from memlm.tasks.task import Score, Task


def find_task(name: str) -> Task:
    """Return the task of this name; ValueError names the nearest."""
    task = TASKS.get(name) or find_probe(name)
    if task is None:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown task {name!r}; tasks are {', '.join(TASKS)}; the nearest is {nearest!r}"
        )
    return task


def _babi(name: str) -> Task:
    def mark(output: str, target: str, question: str) -> Score:
        return Score(
            babilong_score(output, target, question, name),
            babilong_score(output, target, question, name, strict_compat=True),
            exact_match(output, target),
        )

    return Task(name, lambda seed: babi.generate(name, seed), mark, _QUESTIONS.get(name, 5))


# How many questions the original asks about one story, where it is not five.
_QUESTIONS = {"qa15": 4, "qa16": 1, "qa17": 8, "qa20": 12}
TASKS: dict[str, Task] = {name: _babi(name) for name in babi.TASKS} | PROBES
