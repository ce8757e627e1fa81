"""Stories of bAbI that never end, with every question that follows from what was told.

A story of the original tasks asks five questions and ends. Training asks many more: of each of its
tasks after every few facts, and lessons besides, simpler questions that an answer is made of and
that no task asks. Who had the apple, and where had Mary been before she came to the kitchen, are the
two steps of where the apple was before the kitchen; whether somebody carries it, and where it was left
if not, are those of where it is. Learned one by one they are learned fast, where all at once was not
learned at all (docs/log.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Sequence
from typing import Any, Protocol

from memlm.tasks.babi.generators.events import DIALECTS, NUMBERS
from memlm.tasks.babi.generators.places import WALKS, Step
from memlm.tasks.babi.generators.relations import place_on_a_line, tell_placement
from memlm.tasks.babi.generators.world import DIRECTIONS, PLACES, Event, World

LESSONS = ("handler", "holder", "taker", "before", "carrier", "carried", "left", "gift")
# Not qa11 and qa13: where a fact found no room in its segment, nobody knows who the next one calls "she".
WALKED = ("qa9", "qa10", "qa12")
TASKS = (*DIALECTS, "qa4", *WALKED)
# The newest facts that are asked about: all four actors have moved within these, 999 times in 1,000.
RECENT_FACTS = 32
# Newest facts of qa4 that are asked about; its stories have two.
RECENT_PLACEMENTS = 4


class Telling(Protocol):
    """An endless story. What happens is drawn, told, and counts as known once it was noted."""

    def draw(self) -> Any:
        """Let the next thing happen and return it."""

    def tell(self, event: Any) -> str:
        """The fact, as bAbI words it."""

    def note(self, event: Any) -> None:
        """Take `event` as read: from now on it may be asked about."""

    def answers(self, kind: str) -> dict[str, str]:
        """The questions of a task or lesson that the noted facts answer, with their answers.

        All there are, but one alone answered "no" beside what is answered yes or maybe.
        """


def kinds_of(task: str) -> set[str]:
    """What the endless stories of `task` can be asked: tasks and lessons."""
    if task not in DIALECTS:
        return {task}
    dialect = DIALECTS[task]
    found = {"qa1", "qa6", "before"}
    if dialect.handles:
        found |= {"qa2", "qa3", "qa7", "qa8"}
        found |= {"handler", "holder", "taker", "carrier", "carried", "left"}
    return found | {"qa5", "gift"} if dialect.gives else found


def telling(task: str, rng: random.Random) -> Telling:
    """An endless story of `task`, one of TASKS."""
    if task in WALKED:
        return Walks(task, rng)
    return Rooms(rng) if task == "qa4" else Events(task, rng)


def _recent(number: int, count: int) -> bool:
    """Whether the fact of this number is among the newest of `count` that were noted."""
    return number > count - RECENT_FACTS


class Events:
    """Actors who move about, carry things and hand them over: qa1 to qa3 and qa5 to qa8."""

    def __init__(self, task: str, rng: random.Random) -> None:
        self.world = World(DIALECTS[task], rng)
        self.count = 0
        # actor -> their places in order, each with the number of the fact that told it.
        self.ways: dict[str, list[tuple[str, int]]] = {}
        # thing -> its newest event: the number, the actor who has it or put it down, how many moves of
        # theirs were noted when they got it (None: nobody told) and when they put it down (None: not yet).
        self.hands: dict[str, tuple[int, str, int | None, int | None]] = {}
        # thing -> number, giver, receiver of its newest gift; (giver, receiver) -> their newest gift.
        self.gifts: dict[str, tuple[int, str, str]] = {}
        self.given: dict[tuple[str, str], str] = {}
        # actor -> things they ever had, in the order of having them first; the number of the fact by which
        # something last passed through their hands.
        self.had: dict[str, dict[str, None]] = {}
        self.busy: dict[str, int] = {}

    def draw(self) -> Event:
        return self.world.step()

    def tell(self, event: Event) -> str:
        return self.world.tell(event)

    def note(self, event: Event) -> None:
        self.count += 1
        if event.kind == "move":
            self.ways.setdefault(event.actor, []).append((event.thing, self.count))
            return
        holder = event.receiver or event.actor
        begun: int | None = len(self.ways.get(holder, []))
        ended = None
        if event.kind == "drop":
            before = self.hands.get(event.thing)
            begun, ended = (before[2] if before and before[1] == holder else None), begun
        self.hands[event.thing] = (self.count, holder, begun, ended)
        for actor in dict.fromkeys((event.actor, holder)):
            self.had.setdefault(actor, {})[event.thing] = None
            self.busy[actor] = self.count
        if event.kind == "give":
            self.gifts[event.thing] = (self.count, event.actor, event.receiver)
            self.given[event.actor, event.receiver] = event.thing

    def answers(self, kind: str) -> dict[str, str]:
        find = _ANSWERS.get(kind)
        return find(self) if find else {}

    def recent(self, number: int) -> bool:
        """Whether the fact with this number is among the newest."""
        return _recent(number, self.count)

    def journeys(self) -> dict[str, list[str]]:
        """thing -> the places its newest carrier took it to, as far as was told."""
        found = {}
        for thing, (number, actor, begun, ended) in self.hands.items():
            if begun is not None and self.recent(number):
                found[thing] = [place for place, _ in self.ways.get(actor, [])[begun:ended]]
        return found


class Rooms:
    """Places north, south, east or west of one another: qa4, told on and on.

    Facts come in pairs about three places in a line, as in the original. The pairs do not lie on one map:
    the newest word on a place and a direction is what counts.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.due: list[tuple[str, str, str]] = []
        self.known: dict[tuple[str, str], str] = {}

    def draw(self) -> tuple[str, str, str]:
        self.due = self.due or place_on_a_line(self.rng)
        return self.due.pop()

    def tell(self, event: tuple[str, str, str]) -> str:
        return tell_placement(*event)

    def note(self, event: tuple[str, str, str]) -> None:
        subject, direction, other = event
        # What lay here before does so no longer, whichever way round it was told.
        self.known.pop((direction, other), None)
        self.known.pop((DIRECTIONS[direction], subject), None)
        self.known[direction, other] = subject

    def answers(self, kind: str) -> dict[str, str]:
        found = {}
        for direction, other in list(self.known)[-RECENT_PLACEMENTS:] if kind == "qa4" else ():
            subject = self.known[direction, other]
            found[f"What is {direction} of the {other}?"] = subject
            found[f"What is the {other} {DIRECTIONS[direction]} of?"] = subject
        return found


class Walks:
    """Actors who only move about, told with negations, alternatives or in pairs: qa9, qa10, qa12."""

    def __init__(self, task: str, rng: random.Random) -> None:
        self.task, self.walk = task, WALKS[task]
        self.walkers = self.walk.begin(rng)
        self.due: list[Step] = []
        self.count = 0
        # actor -> their newest step, and the number of the fact that told it.
        self.steps: dict[str, tuple[Step, int]] = {}

    def draw(self) -> Step:
        # Where a turn stands in its story, here 0, only numbers its supporting facts, which nobody reads.
        self.due = self.due or self.walk.turn(self.walkers, 0)
        return self.due.pop(0)

    def tell(self, event: Step) -> str:
        return event.fact

    def note(self, event: Step) -> None:
        self.count += 1
        self.steps |= dict.fromkeys(event.actors, (event, self.count))

    def answers(self, kind: str) -> dict[str, str]:
        if kind != self.task:
            return {}
        known = {
            actor: step
            for actor, (step, number) in self.steps.items()
            if _recent(number, self.count)
        }
        if self.task == "qa12":
            return {f"Where is {actor}?": step.reached for actor, step in known.items()}
        return {
            f"Is {actor} in the {place}?": answer
            for actor, step in known.items()
            for place, answer in self._whether(step).items()
        }

    def _whether(self, step: Step) -> dict[str, str]:
        """Whether whoever did `step` is at a place: as often yes or maybe as no, nearly."""
        if step.denied:
            return {step.denied: "no"}
        found = {p: "maybe" for p in step.offered} or {step.reached: "yes"}
        return found | _one_denied(self.walk.places, found, self.count)


def _one_denied(places: Sequence[str], held: Container[str], count: int) -> dict[str, str]:
    """One place where somebody is not, another after each fact: all would make "no" the best guess."""
    others = [place for place in places if place not in held]
    return {others[count % len(others)]: "no"}


def _whereabouts_of_actors(story: Events) -> dict[str, str]:
    newest = {actor: way[-1] for actor, way in story.ways.items()}
    return {
        f"Where is {actor}?": place
        for actor, (place, number) in newest.items()
        if story.recent(number)
    }


def _whereabouts_of_things(story: Events) -> dict[str, str]:
    found = {}
    for thing, (number, actor, begun, ended) in story.hands.items():
        way = story.ways.get(actor, [])
        # Something carried is where its carrier moved to with it; something put down, where they stood.
        places = way[begun:] if ended is None else way[:ended]
        if places and story.recent(number):
            found[f"Where is the {thing}?"] = places[-1][0]
    return found


def _whereabouts_of_carried_things(story: Events) -> dict[str, str]:
    """Of qa2, where nobody ever told the place together with the thing."""
    held = {f"Where is the {thing}?" for thing, hand in story.hands.items() if hand[3] is None}
    return {q: place for q, place in _whereabouts_of_things(story).items() if q in held}


def _steps(way: list[str]) -> dict[str, str]:
    """Each place that was come to from another -> the place before its latest visit."""
    visits = {place: at for at, place in enumerate(way)}
    return {place: way[at - 1] for place, at in visits.items() if at}


def _places_before(story: Events) -> dict[str, str]:
    return {
        f"Where was the {thing} before the {place}?": before
        for thing, way in story.journeys().items()
        for place, before in _steps(way).items()
    }


def _givings(story: Events) -> dict[str, str]:
    found = {}
    for thing, (number, giver, receiver) in story.gifts.items():
        if not story.recent(number):
            continue
        found[f"Who gave the {thing}?"] = giver
        found[f"Who gave the {thing} to {receiver}?"] = giver
        found[f"Who received the {thing}?"] = receiver
        found[f"Who did {giver} give the {thing} to?"] = receiver
    return found | _gifts(story)


def _gifts(story: Events) -> dict[str, str]:
    return {
        f"What did {giver} give to {receiver}?": thing
        for thing, (number, giver, receiver) in story.gifts.items()
        if story.recent(number) and story.given[giver, receiver] == thing
    }


def _present(place: str, count: int) -> dict[str, str]:
    return {place: "yes"} | _one_denied(PLACES, {place}, count)


def _presences(story: Events) -> dict[str, str]:
    return {
        f"Is {actor} in the {place}?": answer
        for actor, way in story.ways.items()
        if story.recent(way[-1][1])
        for place, answer in _present(way[-1][0], story.count).items()
    }


def _carried(story: Events, actor: str) -> list[str]:
    """What an actor carries, in the order in which they first had it."""
    return [
        thing
        for thing in story.had[actor]
        if story.hands[thing][1] == actor and story.hands[thing][3] is None
    ]


def _counts(story: Events) -> dict[str, str]:
    return {
        f"How many objects is {actor} carrying?": NUMBERS[len(_carried(story, actor))]
        for actor, number in story.busy.items()
        if story.recent(number)
    }


def _listings(story: Events) -> dict[str, str]:
    return {
        f"What is {actor} carrying?": ",".join(_carried(story, actor)) or "nothing"
        for actor, number in story.busy.items()
        if story.recent(number)
    }


def _handlers(story: Events) -> dict[str, str]:
    return {
        f"Who had the {thing}?": actor
        for thing, (number, actor, _, _) in story.hands.items()
        if story.recent(number)
    }


def _places_of_handlers(story: Events) -> dict[str, str]:
    """Where whoever had a thing last is now, with it or not: two steps, with no way around the first."""
    return {
        f"Where is the one who had the {thing}?": story.ways[actor][-1][0]
        for thing, (number, actor, _, _) in story.hands.items()
        if story.recent(number) and actor in story.ways and story.recent(story.ways[actor][-1][1])
    }


def _takers(story: Events) -> dict[str, str]:
    """Who took a thing to a place on its newest journey: the handler, where a place is named too."""
    return {
        f"Who took the {thing} to the {place}?": story.hands[thing][1]
        for thing, way in story.journeys().items()
        for place in way
    }


def _carriers(story: Events) -> dict[str, str]:
    return {
        f"Who carries the {thing}?": actor if ended is None else "nobody"
        for thing, (number, actor, _, ended) in story.hands.items()
        if story.recent(number)
    }


def _places_left(story: Events) -> dict[str, str]:
    """Where things were put down that nobody has taken since."""
    return {
        f"Where was the {thing} left?": way[-1][0]
        for thing, (number, actor, _, ended) in story.hands.items()
        if story.recent(number) and ended is not None and (way := story.ways.get(actor, [])[:ended])
    }


def _ways_before(story: Events) -> dict[str, str]:
    return {
        f"Where was {actor} before the {place}?": before
        for actor, way in story.ways.items()
        for place, before in _steps([p for p, number in way if story.recent(number)]).items()
    }


_ANSWERS: dict[str, Callable[[Events], dict[str, str]]] = {
    "qa1": _whereabouts_of_actors,
    "qa2": _whereabouts_of_things,
    "qa3": _places_before,
    "qa5": _givings,
    "qa6": _presences,
    "qa7": _counts,
    "qa8": _listings,
    "handler": _handlers,
    "holder": _places_of_handlers,
    "before": _ways_before,
    "taker": _takers,
    "carrier": _carriers,
    "carried": _whereabouts_of_carried_things,
    "left": _places_left,
    "gift": _gifts,
}
