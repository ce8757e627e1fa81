"""A small world of actors, places and objects, told in bAbI's sentences.

Everyone and everything starts at a place that no sentence tells, so an object may be taken before
any place is known, as happens in bAbI's own stories.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
ACTORS = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}

GIVE_WEIGHT = 14

Kind = Literal["move", "get", "drop", "give"]

VERBS: dict[Kind, tuple[str, ...]] = {
    "move": ("moved", "went", "went back", "journeyed", "travelled"),
    "get": ("got", "grabbed", "took", "picked up"),
    "drop": ("dropped", "left", "discarded", "put down"),
    "give": ("gave", "handed", "passed"),
}


@dataclass(frozen=True)
class Event:
    """Something an actor did: `thing` is the place of a move, else the object."""

    kind: Kind
    actor: str
    thing: str
    receiver: str = ""


@dataclass(frozen=True)
class Dialect:
    """How one task mixes and words its events.

    `moves` is the share of moves among all events. `got_there` and `dropped_there` are the shares
    of such events whose sentence ends in "there". All were measured on the original stories.
    """

    actors: tuple[str, ...]
    moves: float
    got_there: float = 1.0
    dropped_there: float = 0.2
    gives: bool = False


class World:
    """The true state of a story, and the events that are possible in it."""

    def __init__(self, dialect: Dialect, rng: random.Random) -> None:
        self.dialect = dialect
        self.rng = rng
        self.place = {actor: rng.choice(PLACES) for actor in dialect.actors}
        self.spot = {thing: rng.choice(PLACES) for thing in OBJECTS}  # where an object lies
        self.holder: dict[str, str | None] = dict.fromkeys(OBJECTS)

    def step(self) -> Event:
        """Draw a possible event and let it happen."""
        # Handling needs an actor beside an object; when there is none, somebody moves.
        handling = [] if self.rng.random() < self.dialect.moves else self._handlings()
        event = self.rng.choice(handling) if handling else self._move()
        self._apply(event)
        return event

    def tell(self, event: Event) -> str:
        """Word an event as bAbI does."""
        verb = self.rng.choice(VERBS[event.kind])
        if event.kind == "move":
            return f"{event.actor} {verb} to the {event.thing}."
        if event.kind == "give":
            return f"{event.actor} {verb} the {event.thing} to {event.receiver}."
        share = self.dialect.got_there if event.kind == "get" else self.dialect.dropped_there
        there = " there" if self.rng.random() < share else ""
        return f"{event.actor} {verb} the {event.thing}{there}."

    def _move(self) -> Event:
        actor = self.rng.choice(self.dialect.actors)
        return Event("move", actor, self.rng.choice([p for p in PLACES if p != self.place[actor]]))

    def _handlings(self) -> list[Event]:
        events = []
        for thing in OBJECTS:
            holder = self.holder[thing]
            if holder is None:
                takers = [a for a in self.dialect.actors if self.place[a] == self.spot[thing]]
                # One candidate per object, so that crowded places do not favour taking.
                if takers:
                    events.append(Event("get", self.rng.choice(takers), thing))
                continue
            events.append(Event("drop", holder, thing))
            if self.dialect.gives:
                beside = [
                    a
                    for a in self.dialect.actors
                    if a != holder and self.place[a] == self.place[holder]
                ]
                if beside:
                    # The original stories give more often than an even draw would.
                    give = Event("give", holder, thing, self.rng.choice(beside))
                    events += [give] * GIVE_WEIGHT
        return events

    def _apply(self, event: Event) -> None:
        if event.kind == "move":
            self.place[event.actor] = event.thing
        elif event.kind == "get":
            self.holder[event.thing] = event.actor
        elif event.kind == "drop":
            self.holder[event.thing] = None
            self.spot[event.thing] = self.place[event.actor]
        else:
            self.holder[event.thing] = event.receiver
