"""qa4: where things stand to each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from memlm.eval.babi.generators.world import DIRECTIONS, PLACES
from memlm.eval.babi.story import Story


def _directions(task: str, rng: random.Random) -> Iterator[Story]:
    """Tell of three places on a line; ask for the subject of one of the two facts."""
    middle, first, second = rng.sample(PLACES, 3)
    direction = rng.choice(sorted(DIRECTIONS))
    told = []
    for end, of_middle in ((first, direction), (second, DIRECTIONS[direction])):
        # In the original the middle is the object of a fact 65 times in 100.
        if rng.random() < 0.65:
            told.append((end, of_middle, middle))
        else:
            told.append((middle, DIRECTIONS[of_middle], end))
    rng.shuffle(told)
    index = rng.randrange(2)
    subject, relation, place = told[index]
    question = (
        f"What is {relation} of the {place}?"
        if rng.random() < 0.5
        else f"What is the {place} {DIRECTIONS[relation]} of?"
    )
    facts = [f"The {s} is {r} of the {o}." for s, r, o in told]
    yield Story(facts, question, subject, [index], task)


TELLERS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = {"qa4": _directions}
