"""Endless seeded stories for qa1 to qa5, in the forms and proportions of bAbI's en-10k files.

A story runs until its fifth question (qa4: its first), with a question tried after every two
facts. Each question is yielded as a `Story` of its own: the facts so far, earlier questions left
out. The generator keeps its own books for answers; `solver.py` checks them independently.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from memlm.eval.babi.story import Story, check_task
from memlm.eval.babi.world import ACTORS, DIRECTIONS, GIVERS, PLACES, Dialect, Event, World

QUESTIONS_PER_STORY = 5
FACTS_PER_TURN = 2

# (question, answer, supporting facts)
Asked = tuple[str, str, list[int]]

DIALECTS = {
    "qa1": Dialect(ACTORS, moves=1.0),
    "qa2": Dialect(ACTORS, moves=0.63),
    "qa3": Dialect(ACTORS, moves=0.63, got_there=0.2),
    "qa5": Dialect(GIVERS, moves=0.53, dropped_there=0.17, gives=True),
}


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


def _tell_events(
    task: str, rng: random.Random, ask: Callable[[list[Event], random.Random], Asked | None]
) -> Iterator[Story]:
    """Tell one story, asking after every second fact whatever `ask` finds to ask."""
    world = World(DIALECTS[task], rng)
    events: list[Event] = []
    facts: list[str] = []
    asked = 0
    while asked < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_TURN):
            events.append(world.step())
            facts.append(world.tell(events[-1]))
        found = ask(events, rng)
        if found is not None:
            asked += 1
            question, answer, supporting = found
            yield Story(list(facts), question, answer, supporting, task)


def _whereabouts_of_actor(events: list[Event], rng: random.Random) -> Asked:
    last = {event.actor: index for index, event in enumerate(events)}
    # The original asks about the newest fact more often than an even draw over actors would.
    actor = events[-1].actor if rng.random() < 0.17 else rng.choice(sorted(last))
    return f"Where is {actor}?", events[last[actor]].thing, [last[actor]]


def _trail(events: list[Event], thing: str) -> tuple[int, list[int], bool] | None:
    """Return the last event on `thing`, the moves (newest first) that place it, and if it lies.

    A carried object is placed by its holder's moves since it was taken; a dropped one by all the
    moves of its last holder, as nothing else can tell where that holder stood.
    """
    handled = [i for i, e in enumerate(events) if e.thing == thing and e.kind in ("get", "drop")]
    if not handled:
        return None
    last = handled[-1]
    actor, lies = events[last].actor, events[last].kind == "drop"
    span = range(last - 1, -1, -1) if lies else range(len(events) - 1, last, -1)
    moves = [i for i in span if events[i].kind == "move" and events[i].actor == actor]
    return last, moves, lies


def _whereabouts_of_object(events: list[Event], rng: random.Random) -> Asked | None:
    choices: list[Asked] = []
    for thing in sorted({e.thing for e in events if e.kind != "move"}):
        trail = _trail(events, thing)
        if trail and trail[1]:
            last, moves, lies = trail
            share = 0.8 if lies else 0.75 if len(moves) == 1 else 0.1
            if rng.random() > share:
                continue
            place = events[moves[0]].thing
            choices.append((f"Where is the {thing}?", place, [last, moves[0]]))
    return rng.choice(choices) if choices else None


def _place_before(events: list[Event], rng: random.Random) -> Asked | None:
    choices: list[Asked] = []
    for thing in sorted({e.thing for e in events if e.kind != "move"}):
        trail = _trail(events, thing)
        if not trail or len(trail[1]) < 2:
            continue
        last, moves, lies = trail
        newest, before = moves[:2]
        # The object must have been carried through both moves, not met on the way.
        if lies and not _held_through(events, thing, before, last):
            continue
        share = 0.8 if lies else 0.28 if len(moves) == 2 else 0.04
        if rng.random() > share:
            continue
        question = f"Where was the {thing} before the {events[newest].thing}?"
        choices.append((question, events[before].thing, [last, newest, before]))
    return rng.choice(choices) if choices else None


def _held_through(events: list[Event], thing: str, start: int, end: int) -> bool:
    return not any(e.kind == "get" and e.thing == thing for e in events[start:end])


def _giving(events: list[Event], rng: random.Random) -> Asked | None:
    gives = [i for i, e in enumerate(events) if e.kind == "give"]
    if not gives:
        return None
    last = gives[-1]
    event = events[last]
    handled_since = any(e.kind != "move" and e.thing == event.thing for e in events[last + 1 :])
    # The original falls silent more often once the object has changed hands otherwise.
    if rng.random() > (0.35 if handled_since else 0.95):
        return None
    giver, thing, receiver = event.actor, event.thing, event.receiver
    forms = (
        (f"What did {giver} give to {receiver}?", thing),
        (f"What did {giver} give to {receiver}?", thing),
        (f"Who gave the {thing}?", giver),
        (f"Who gave the {thing} to {receiver}?", giver),
        (f"Who received the {thing}?", receiver),
        (f"Who did {giver} give the {thing} to?", receiver),
    )
    question, answer = rng.choice(forms)
    return question, answer, [last]


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


GENERATORS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = {
    "qa1": lambda task, rng: _tell_events(task, rng, _whereabouts_of_actor),
    "qa2": lambda task, rng: _tell_events(task, rng, _whereabouts_of_object),
    "qa3": lambda task, rng: _tell_events(task, rng, _place_before),
    "qa4": _directions,
    "qa5": lambda task, rng: _tell_events(task, rng, _giving),
}
