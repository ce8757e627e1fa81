"""Who is where with what: qa1 to qa3 and qa5 to qa14.

A drop by someone never seen taking the object proves that they carried it all along; taking an object
from a known place proves where the taker stands; giver and receiver stand together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from memlm.tasks.babi.solver.sentences import Happening, Listener

# Places in the order in which somebody or something was there; None: somewhere that was not told.
Trail = list[str | None]


@dataclass
class KnownWorld:
    """What follows from the happenings, taken in the order of their times.

    had: what each actor ever carried, in the order in which they first did. either: the places where
    somebody may be, and without: those where they are not, while the end of their trail is None.
    """

    trails: dict[str, Trail] = field(default_factory=dict)
    object_trails: dict[str, Trail] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    had: dict[str, list[str]] = field(default_factory=dict)
    gifts: list[tuple[str, str, str]] = field(default_factory=list)
    either: dict[str, tuple[str, ...]] = field(default_factory=dict)
    without: dict[str, set[str]] = field(default_factory=dict)

    def apply(self, happening: Happening) -> None:
        """Take in the next happening."""
        kind, what = happening.kind, happening.what
        for who in happening.who:
            self.trails.setdefault(who, [])
            if kind == "at":
                self._stand(who, what[0])
            elif kind == "either":
                self._lose(who)
                self.either[who] = what
            elif kind == "no longer":
                self._lose(who)
                self.without[who] = {what[0]}
            elif kind == "not":
                self._deny(who, what[0])
            elif kind == "get":
                self._get(who, what[0])
            elif kind == "drop":
                self._drop(who, what[0])
            else:
                self._give(who, *what)

    def carried(self, actor: str) -> list[str] | None:
        """List what an actor carries, as bAbI does: in the order in which they first had each thing.

        None for an actor that no fact speaks of.
        """
        if actor not in self.trails:
            return None
        return [thing for thing in self.had.get(actor, ()) if self.holder.get(thing) == actor]

    def is_in(self, actor: str, place: str) -> str | None:
        """Answer yes, no or maybe; None when nothing follows."""
        stands = _last(self.trails.get(actor))
        if stands is not None:
            return "yes" if stands == place else "no"
        if place in self.without.get(actor, ()):
            return "no"
        if actor in self.either:
            return "maybe" if place in self.either[actor] else "no"
        return None

    def _stand(self, actor: str, place: str | None) -> None:
        """Let an actor and whatever they carry be at a place, None for an unknown one."""
        self.either.pop(actor, None)
        self.without.pop(actor, None)
        _append(self.trails.setdefault(actor, []), [place])
        for thing in self.carried(actor) or []:
            _append(self.object_trails.setdefault(thing, []), [place])

    def _lose(self, actor: str) -> None:
        """Let an actor be at a place that was not told; whatever was known about it is out of date."""
        self._stand(actor, None)

    def _deny(self, actor: str, place: str) -> None:
        """Record that an actor is not at a place, which may leave one of two."""
        stands = _last(self.trails.get(actor))
        left = [other for other in self.either.get(actor, ()) if other != place]
        if stands == place:
            self._lose(actor)
        if stands in (None, place):
            self.without.setdefault(actor, set()).add(place)
        if len(set(left)) == 1:
            self._stand(actor, left[0])

    def _get(self, actor: str, thing: str) -> None:
        self._hold(actor, thing)
        self._meet((actor,), thing)

    def _drop(self, actor: str, thing: str) -> None:
        trail = self.object_trails.setdefault(thing, [])
        if self.holder.pop(thing, None) != actor:
            _append(trail, self.trails[actor])

    def _give(self, giver: str, thing: str, receiver: str) -> None:
        self.gifts.append((giver, thing, receiver))
        self._hold(receiver, thing)
        self._meet((giver, receiver), thing)

    def _hold(self, actor: str, thing: str) -> None:
        self.holder[thing] = actor
        had = self.had.setdefault(actor, [])
        if thing not in had:
            had.append(thing)

    def _meet(self, actors: tuple[str, ...], thing: str) -> None:
        """Let those who handle a thing share the first place that is known for one of them."""
        trails = [self.trails.get(actor) for actor in actors]
        known = (_last(trail) for trail in (*trails, self.object_trails.get(thing)))
        place = next((place for place in known if place is not None), None)
        for actor in actors:
            # Somebody who was never the subject of a sentence is known from now on.
            self.trails.setdefault(actor, [])
            if place is not None:
                self._stand(actor, place)


class Reading:
    """What has been read so far."""

    def __init__(self) -> None:
        self._listener = Listener()
        self._heard: list[Happening] = []

    def read(self, sentence: str) -> bool:
        happening = self._listener.hear(sentence)
        if happening is not None:
            self._heard.append(happening)
        return happening is not None

    def world(self) -> KnownWorld:
        world = KnownWorld()
        # Sorting keeps the told order of what happened at the same time.
        for happening in sorted(self._heard, key=lambda h: h.time):
            world.apply(happening)
        return world


def _append(trail: Trail, places: Iterable[str | None]) -> None:
    for place in places:
        if not trail or trail[-1] != place:
            trail.append(place)


def _last(trail: Trail | None) -> str | None:
    return trail[-1] if trail else None


def _before(trail: Trail | None, place: str) -> str | None:
    for earlier, later in reversed(list(itertools.pairwise(trail or ()))):
        if later == place:
            return earlier
    return None


def _gift(
    reading: Reading, part: int, giver: str = "", thing: str = "", receiver: str = ""
) -> str | None:
    wanted = (giver, thing, receiver)
    for gift in reversed(reading.world().gifts):
        if all(want in ("", told) for want, told in zip(wanted, gift, strict=True)):
            return gift[part]
    return None


def _count(reading: Reading, actor: str) -> str | None:
    carried = reading.world().carried(actor)
    if carried is None:
        return None
    names = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return names[len(carried)] if len(carried) < len(names) else str(len(carried))


def _list(reading: Reading, actor: str) -> str | None:
    carried = reading.world().carried(actor)
    return None if carried is None else ",".join(carried) or "nothing"


QUESTIONS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r"Where is the (\w+)\?", lambda r, thing: _last(r.world().object_trails.get(thing))),
    (r"Where is (\w+)\?", lambda r, actor: _last(r.world().trails.get(actor))),
    (
        r"Where was the (\w+) before the (\w+)\?",
        lambda r, thing, place: _before(r.world().object_trails.get(thing), place),
    ),
    (
        r"Where was (\w+) before the (\w+)\?",
        lambda r, actor, place: _before(r.world().trails.get(actor), place),
    ),
    (r"Is (\w+) in the (\w+)\?", lambda r, actor, place: r.world().is_in(actor, place)),
    (r"How many objects is (\w+) carrying\?", _count),
    (r"What is (\w+) carrying\?", _list),
    (r"What did (\w+) give to (\w+)\?", lambda r, a, b: _gift(r, 1, giver=a, receiver=b)),
    (r"Who gave the (\w+) to (\w+)\?", lambda r, o, b: _gift(r, 0, thing=o, receiver=b)),
    (r"Who gave the (\w+)\?", lambda r, o: _gift(r, 0, thing=o)),
    (r"Who received the (\w+)\?", lambda r, o: _gift(r, 2, thing=o)),
    (r"Who did (\w+) give the (\w+) to\?", lambda r, a, o: _gift(r, 2, giver=a, thing=o)),
)
