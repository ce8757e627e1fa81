"""What a model can be asked: a task tells stories without end and scores what was answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from memlm.tasks.babi.story import Story


@dataclass(frozen=True)
class Score:
    """One answer's marks. correct: by the corrected metric; published: by the metric as published, faults
    and all; exact: the target and nothing else; f1: of words, where answers may have several."""

    correct: bool
    published: bool
    exact: bool
    f1: float | None = None


@dataclass(frozen=True)
class Task:
    """tell(seed) yields stories without end; mark(output, target, question) scores an answer.

    questions: how many questions in a row belong to one story, so that samples may be drawn from all
    of them. noise: sentences that replace the run's haystack, repeated in order; empty: the haystack
    itself. answer_tokens: tokens an answer may need, where that is more than a run allows.
    """

    name: str
    tell: Callable[[int | np.random.Generator], Iterator[Story]]
    mark: Callable[[str, str, str], Score]
    questions: int = 1
    noise: tuple[str, ...] = ()
    answer_tokens: int = 1
