"""What a model can be asked: a task tells stories without end and scores what was answered."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from memlm.eval import babi
from memlm.eval.babi.story import TASKS as BABI
from memlm.eval.babi.story import Story
from memlm.eval.metrics import babilong_score, exact_match


@dataclass(frozen=True)
class Score:
    """One answer's marks. correct: by the mended metric; published: by the metric as published, faults
    and all; exact: the target and nothing else."""

    correct: bool
    published: bool
    exact: bool


@dataclass(frozen=True)
class Task:
    """tell(seed) yields stories for ever; mark(output, target, question) scores an answer.

    questions: how many questions in a row belong to one story, so that samples may be drawn from all
    of them. noise: sentences that stand in for the run's haystack, repeated in order; empty: the
    haystack itself.
    """

    name: str
    tell: Callable[[int | np.random.Generator], Iterator[Story]]
    mark: Callable[[str, str, str], Score]
    questions: int = 1
    noise: tuple[str, ...] = ()


def find_task(name: str) -> Task:
    """Return the task of this name; ValueError names the nearest."""
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown task {name!r}; tasks are {', '.join(TASKS)}; the nearest is {nearest!r}"
        )
    return TASKS[name]


def _babi(name: str) -> Task:
    def mark(output: str, target: str, question: str) -> Score:
        return Score(
            babilong_score(output, target, question, name),
            babilong_score(output, target, question, name, strict_compat=True),
            exact_match(output, target),
        )

    # All but qa4 and qa16 ask several questions of one story, most of them five.
    return Task(name, lambda seed: babi.generate(name, seed), mark, questions=5)


TASKS: dict[str, Task] = {name: _babi(name) for name in BABI}
