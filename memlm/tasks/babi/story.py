"""The story record that every bAbI source yields, and the names of the twenty tasks."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

TASKS: tuple[str, ...] = tuple(f"qa{number}" for number in range(1, 21))


@dataclass(frozen=True)
class Story:
    """One question with the facts that precede it.

    `supporting` holds zero-based indices into `facts`, in the order in which bAbI lists them.
    """

    facts: list[str]
    question: str
    answer: str
    supporting: list[int]
    task: str = ""


def check_task(task: str) -> str:
    """Return `task` when it names one of the twenty tasks; otherwise ValueError names the nearest."""
    if task in TASKS:
        return task
    nearest = difflib.get_close_matches(str(task), TASKS, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown task {task!r}; tasks are qa1 to qa20, the nearest is {nearest!r}")
