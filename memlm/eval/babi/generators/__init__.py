"""Endless seeded stories in the forms and proportions of bAbI's en-10k files.

Each question is yielded as a `Story` of its own: the facts so far, earlier questions left out. The
generators keep their own books for answers; the solver checks them independently.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from memlm.eval.babi.generators import events, kinds, motives, places, relations
from memlm.eval.babi.story import TASKS, Story, check_task

# A teller yields the questions of one story, given the task's name and where its chances come from.
Teller = Callable[[str, random.Random], Iterator[Story]]

_KNOWN = events.TELLERS | places.TELLERS | relations.TELLERS | kinds.TELLERS | motives.TELLERS
GENERATORS: dict[str, Teller] = {task: _KNOWN[task] for task in TASKS if task in _KNOWN}


def generate(task: str, seed: int | np.random.Generator) -> Iterator[Story]:
    """Return an endless iterator of stories of `task`, the same for the same seed."""
    check_task(task)
    if task not in GENERATORS:
        raise ValueError(
            f"no generator for task {task!r} yet; generated tasks are {', '.join(GENERATORS)}, "
            "for others read the original files with babi.load"
        )
    if isinstance(seed, np.random.Generator):
        seed = int(seed.integers(2**63))
    # A string seed is hashed by `random` itself: stable across processes and versions.
    return _endless(task, random.Random(f"{task}/{seed}"))


def _endless(task: str, rng: random.Random) -> Iterator[Story]:
    tell = GENERATORS[task]
    while True:
        yield from tell(task, rng)
