"""Endless seeded stories in the forms and proportions of bAbI's en-10k files.

Each question is yielded as its own `Story`: the facts so far, without earlier questions. The generators
keep track of the answers themselves; the solver checks them independently.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from memlm.tasks.babi.generators import events, kinds, motives, places, relations
from memlm.tasks.babi.story import Story, check_task

# A teller yields the questions of one story, given the task's name and a source of randomness.
Teller = Callable[[str, random.Random], Iterator[Story]]

_TELLERS: dict[str, Teller] = (
    events.TELLERS | places.TELLERS | relations.TELLERS | kinds.TELLERS | motives.TELLERS
)


def generate(task: str, seed: int | np.random.Generator) -> Iterator[Story]:
    """Return an endless iterator of stories of `task`, the same for the same seed."""
    check_task(task)
    if isinstance(seed, np.random.Generator):
        seed = int(seed.integers(2**63))
    # A string seed is hashed by `random` itself: stable across processes and versions.
    return _endless(task, random.Random(f"{task}/{seed}"))


def _endless(task: str, rng: random.Random) -> Iterator[Story]:
    tell = _TELLERS[task]
    while True:
        yield from tell(task, rng)
