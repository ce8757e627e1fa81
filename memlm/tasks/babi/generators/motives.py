"""qa20: a state of mind sends somebody to a place, where they take what cures it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from memlm.tasks.babi.generators.world import VERBS
from memlm.tasks.babi.story import Story

NAMES = ("Antoine", "Jason", "Sumit", "Yann")
# state of mind -> (place, thing)
CURES = {
    "bored": ("garden", "football"),
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "tired": ("bedroom", "pajamas"),
}


def _motives(task: str, rng: random.Random) -> Iterator[Story]:
    """Let everyone feel, go and take, with a question after each fact, until nothing is left to do.

    Of two in the same state only the first finds the thing.
    """
    states = {name: rng.choice(sorted(CURES)) for name in NAMES}
    done = dict.fromkeys(NAMES, 0)  # how many of the three acts
    felt: dict[str, int] = {}  # the fact that told the state
    taken: set[str] = set()
    facts: list[str] = []
    while True:
        able = [n for n in NAMES if done[n] < 2 or (done[n] == 2 and states[n] not in taken)]
        if not able:
            return
        name = rng.choice(able)
        state = states[name]
        place, thing = CURES[state]
        if done[name] == 0:
            felt[name] = len(facts)
            facts.append(f"{name} is {state}.")
            question, answer = f"Where will {name.lower()} go?", place
        elif done[name] == 1:
            facts.append(f"{name} {rng.choice(VERBS['move'])} to the {place}.")
            question, answer = f"Why did {name.lower()} go to the {place}?", state
        else:
            taken.add(state)
            facts.append(f"{name} {rng.choice(VERBS['get'])} the {thing} there.")
            question, answer = f"Why did {name.lower()} get the {thing}?", state
        done[name] += 1
        yield Story(list(facts), question, answer, [felt[name]], task)


TELLERS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = {"qa20": _motives}
