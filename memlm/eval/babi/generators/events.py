"""qa1 to qa3 and qa5: actors who move about, carry things and hand them over, in bAbI's proportions.

A story runs until its fifth question, with a question tried after every two facts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from memlm.eval.babi.generators.world import ACTORS, GIVERS, Dialect, Event, World
from memlm.eval.babi.story import Story

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


TELLERS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = {
    "qa1": lambda task, rng: _tell_events(task, rng, _whereabouts_of_actor),
    "qa2": lambda task, rng: _tell_events(task, rng, _whereabouts_of_object),
    "qa3": lambda task, rng: _tell_events(task, rng, _place_before),
    "qa5": lambda task, rng: _tell_events(task, rng, _giving),
}
