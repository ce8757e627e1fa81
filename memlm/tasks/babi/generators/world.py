"""A small world of actors, places and objects, told in bAbI's sentences.

Everyone and everything starts at a place that no sentence mentions, so an object may be taken before
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

    `handles` and `gives` say how often an actor who can do so takes or puts down something, and hands
    something over, relative to how often they move. `got_there` and `dropped_there` are the shares of such
    events whose sentence ends in "there". All were measured on the original stories.
    """

    actors: tuple[str, ...]
    handles: float = 0.0
    gives: float = 0.0
    got_there: float = 1.0
    dropped_there: float = 0.2


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
        event = self._draw()
        self._apply(event)
        return event

    def _draw(self) -> Event:
        moves = len(self.dialect.actors)
        handling, giving = self._handlings(), self._gifts()
        handles, gives = self.dialect.handles * len(handling), self.dialect.gives * len(giving)
        # The more else can be done, the less actors move.
        drawn = self.rng.random() * (moves + handles + gives)
        if drawn < moves:
            return self._move()
        return self.rng.choice(self.rng.choice(handling if drawn < moves + handles else giving))

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

    def _handlings(self) -> list[list[Event]]:
        """Return what each actor can take, and what each can put down.

        Each list is drawn as one choice, so whoever has or sees much does not handle things more often.
        """
        found = []
        for actor in self.dialect.actors:
            lying = [
                Event("get", actor, thing)
                for thing in OBJECTS
                if self.holder[thing] is None and self.spot[thing] == self.place[actor]
            ]
            held = [Event("drop", actor, thing) for thing in self._held_by(actor)]
            found += [events for events in (lying, held) if events]
        return found

    def _gifts(self) -> list[list[Event]]:
        """Return what each actor can hand over to others at the same place."""
        found = [
            [
                Event("give", giver, thing, receiver)
                for thing in self._held_by(giver)
                for receiver in self.dialect.actors
                if receiver != giver and self.place[receiver] == self.place[giver]
            ]
            for giver in self.dialect.actors
        ]
        return [events for events in found if events]

    def _held_by(self, actor: str) -> list[str]:
        return [thing for thing in OBJECTS if self.holder[thing] == actor]

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
