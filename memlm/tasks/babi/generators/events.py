"""qa1 to qa3 and qa5 to qa8: actors who move about, carry things and hand them over.

A story runs until its fifth question, and a question is tried after every two facts. The originals ask
only about what the last five facts touched; where several subjects are that recent, all are equally
likely. Where an answer follows only from older facts, nothing is asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from memlm.tasks.babi.generators.world import ACTORS, GIVERS, PLACES, Dialect, Event, World
from memlm.tasks.babi.story import Story

QUESTIONS_PER_STORY = 5
FACTS_PER_TURN = 2
RECENT = 5
NUMBERS = ("none", "one", "two", "three")

# (question, answer, supporting facts)
Asked = tuple[str, str, list[int]]
# Finds something to ask, given the world and all that has happened in it.
Ask = Callable[[World, list[Event]], Asked | None]

DIALECTS = {
    "qa1": Dialect(ACTORS),
    "qa2": Dialect(ACTORS, handles=1.25),
    "qa3": Dialect(ACTORS, handles=1.25, got_there=0.2),
    "qa5": Dialect(GIVERS, handles=1.25, gives=5.0, dropped_there=0.17),
    "qa6": Dialect(ACTORS, handles=1.25),
    "qa7": Dialect(ACTORS, handles=1.25, gives=5.0),
    "qa8": Dialect(ACTORS, handles=1.25, dropped_there=0.15),
}


def _tell_events(task: str, rng: random.Random, ask: Ask) -> Iterator[Story]:
    """Tell one story, and after every second fact ask what `ask` finds, if anything."""
    world = World(DIALECTS[task], rng)
    events: list[Event] = []
    facts: list[str] = []
    asked = 0
    while asked < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_TURN):
            events.append(world.step())
            facts.append(world.tell(events[-1]))
        found = ask(world, events)
        if found is not None:
            asked += 1
            question, answer, supporting = found
            yield Story(list(facts), question, answer, supporting, task)


def _is_recent(events: list[Event], index: int) -> bool:
    return len(events) - index <= RECENT


def _moves(events: list[Event], actor: str, start: int, end: int) -> list[int]:
    """Return where in `events[start:end]` the actor moves."""
    return [i for i in range(start, end) if (events[i].kind, events[i].actor) == ("move", actor)]


def _handlings(events: list[Event]) -> dict[str, list[int]]:
    """Return the events on each object, for those objects whose last one is recent."""
    handled: dict[str, list[int]] = {}
    for index, event in enumerate(events):
        if event.kind != "move":
            handled.setdefault(event.thing, []).append(index)
    return {t: handled[t] for t in sorted(handled) if _is_recent(events, handled[t][-1])}


def _whereabouts_of_actor(world: World, events: list[Event]) -> Asked:
    last = {event.actor: index for index, event in enumerate(events)}
    # Fitted before the rule of recent facts was known, and kept: a seed's stories must stay the same.
    newest = world.rng.random() < 0.17
    actor = events[-1].actor if newest else world.rng.choice(sorted(last))
    return f"Where is {actor}?", events[last[actor]].thing, [last[actor]]


def _whereabouts_of_object(world: World, events: list[Event]) -> Asked | None:
    """Ask for a carried object that was moved, or a dropped one whose dropper's place was told."""
    choices: list[Asked] = []
    for thing, handled in _handlings(events).items():
        last = handled[-1]
        if events[last].kind == "get":
            moves = _moves(events, events[last].actor, last, len(events))
        else:
            moves = _moves(events, events[last].actor, 0, last)
        if moves:
            choices.append((f"Where is the {thing}?", events[moves[-1]].thing, [last, moves[-1]]))
    return world.rng.choice(choices) if choices else None


def _place_before(world: World, events: list[Event]) -> Asked | None:
    """Ask about any step of an object's last journey, which needs two moves by its carrier."""
    journeys: list[tuple[str, int, list[int]]] = []
    for thing, handled in _handlings(events).items():
        last = handled[-1]
        if events[last].kind == "get":
            moves = _moves(events, events[last].actor, last, len(events))
        else:
            moves = _moves(events, events[last].actor, handled[-2], last)
        if len(moves) >= 2:
            journeys.append((thing, last, moves))
    if not journeys:
        return None
    thing, last, moves = world.rng.choice(journeys)
    # A place visited twice stands for its later visit, and so is asked about twice as often.
    visit = {events[move].thing: at for at, move in enumerate(moves)}
    visits = [visit[events[move].thing] for move in moves]
    at = world.rng.choice([visit for visit in visits if visit > 0])
    newest, before = moves[at], moves[at - 1]
    question = f"Where was the {thing} before the {events[newest].thing}?"
    return question, events[before].thing, [last, newest, before]


def _giving(world: World, events: list[Event]) -> Asked | None:
    gifts = {event.thing: index for index, event in enumerate(events) if event.kind == "give"}
    recent = sorted(thing for thing, index in gifts.items() if _is_recent(events, index))
    if not recent:
        return None
    thing = world.rng.choice(recent)
    last = gifts[thing]
    giver, receiver = events[last].actor, events[last].receiver
    forms = [
        (f"Who gave the {thing}?", giver),
        (f"Who gave the {thing} to {receiver}?", giver),
        (f"Who received the {thing}?", receiver),
        (f"Who did {giver} give the {thing} to?", receiver),
    ]
    # The originals ask this about an outdated gift too (2 of 1000); the later gift is the right answer.
    if not any(
        (e.kind, e.actor, e.receiver) == ("give", giver, receiver) for e in events[last + 1 :]
    ):
        forms += [(f"What did {giver} give to {receiver}?", thing)] * 2
    question, answer = world.rng.choice(forms)
    return question, answer, [last]


def _presence(world: World, events: list[Event]) -> Asked | None:
    """Ask whether an actor is at a place: their own half of the time, else another."""
    last = {event.actor: index for index, event in enumerate(events) if event.kind == "move"}
    recent = sorted(actor for actor, index in last.items() if _is_recent(events, index))
    if not recent:
        return None
    actor = world.rng.choice(recent)
    place = events[last[actor]].thing
    answer = world.rng.choice(("yes", "no"))
    if answer == "no":
        place = world.rng.choice([other for other in PLACES if other != place])
    return f"Is {actor} in the {place}?", answer, [last[actor]]


def _hands(world: World, events: list[Event]) -> tuple[str, list[int]] | None:
    """Choose who lately took, dropped or gave something; return all that passed through their hands.

    Being given something is no reason to be asked about, though it counts.
    """
    recent = sorted({event.actor for event in events[-RECENT:] if event.kind != "move"})
    if not recent:
        return None
    actor = world.rng.choice(recent)
    handled = [
        index
        for index, event in enumerate(events)
        if event.kind != "move" and actor in (event.actor, event.receiver)
    ]
    return actor, handled


def _count(world: World, events: list[Event]) -> Asked | None:
    found = _hands(world, events)
    if found is None:
        return None
    actor, handled = found
    answer = NUMBERS[sum(holder == actor for holder in world.holder.values())]
    return f"How many objects is {actor} carrying?", answer, handled


def _listing(world: World, events: list[Event]) -> Asked | None:
    found = _hands(world, events)
    if found is None:
        return None
    actor, handled = found
    # Objects stand in the order in which the actor first had them, in the answer as in the support,
    # and that order outlasts a drop.
    things = list(dict.fromkeys(events[index].thing for index in handled))
    supporting = [index for thing in things for index in handled if events[index].thing == thing]
    carried = [thing for thing in things if world.holder[thing] == actor]
    return f"What is {actor} carrying?", ",".join(carried) or "nothing", supporting


_ASKS: dict[str, Ask] = {
    "qa1": _whereabouts_of_actor,
    "qa2": _whereabouts_of_object,
    "qa3": _place_before,
    "qa5": _giving,
    "qa6": _presence,
    "qa7": _count,
    "qa8": _listing,
}


def _tell(task: str, rng: random.Random) -> Iterator[Story]:
    return _tell_events(task, rng, _ASKS[task])


TELLERS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = dict.fromkeys(_ASKS, _tell)
