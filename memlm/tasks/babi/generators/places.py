"""qa9 to qa14: actors who only move about, told with negations, alternatives, pronouns and times.

A story asks five questions, one after every two sentences. The originals never draw an actor to ask about:
they draw one of the last five happenings and ask about whoever did it. So the newest and the busiest actors
are asked about most, and those idle for longer are never asked about.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memlm.tasks.babi.generators.world import ACTORS, PLACES, VERBS
from memlm.tasks.babi.story import Story

QUESTIONS_PER_STORY = 5
FACTS_PER_TURN = 2
# How many of the latest happenings a question may start from.
ATTENTION = 5
TRAVELLERS = ("Bill", "Fred", "Julie", "Mary")
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")
PRONOUNS = {"Daniel": "he", "John": "he", "Mary": "she", "Sandra": "she"}
OPENINGS = ("After that", "Afterwards", "Following that", "Then")
TIMES = ("yesterday", "this morning", "this afternoon", "this evening")


class Walkers:
    """Where everybody stands; at first somewhere that no sentence mentions."""

    def __init__(
        self, actors: tuple[str, ...], places: tuple[str, ...], rng: random.Random
    ) -> None:
        self.actors = actors
        self.places = places
        self.rng = rng
        self.place = {actor: rng.choice(places) for actor in actors}

    def draw(self, count: int) -> tuple[tuple[str, ...], str]:
        """Draw who goes where next: to a place where none of them is now."""
        while True:
            actors, place = tuple(self.rng.sample(self.actors, count)), self.rng.choice(self.places)
            # Both draws are repeated together: those who stand together go together a little more often.
            if all(self.place[actor] != place for actor in actors):
                return actors, place

    def move(self, actors: tuple[str, ...], place: str) -> None:
        """Let the actors go to a place."""
        self.place.update(dict.fromkeys(actors, place))

    def elsewhere(self, place: str) -> str:
        """Draw a place other than the given one."""
        return self.rng.choice([other for other in self.places if other != place])


@dataclass(frozen=True)
class Step:
    """A told move to the place `reached`; `supporting` are the facts needed to know of it.

    Where the sentence hides the place, `denied` is the place it says was left, or `offered` the two that
    it says may have been reached.
    """

    actors: tuple[str, ...]
    reached: str
    fact: str
    supporting: tuple[int, ...]
    denied: str = ""
    offered: tuple[str, ...] = ()


# Tells the sentences of one turn, the first of which has the given index in the story.
Turn = Callable[[Walkers, int], list[Step]]
# Words a question on an actor's latest step, with its answer.
Ask = Callable[[Walkers, str, Step], tuple[str, str]]


def _tell_walks(
    task: str, rng: random.Random, walkers: Walkers, turn: Turn, ask: Ask
) -> Iterator[Story]:
    steps: list[Step] = []
    for _ in range(QUESTIONS_PER_STORY):
        steps += turn(walkers, len(steps))
        recent = [actor for step in steps for actor in step.actors][-ATTENTION:]
        actor = rng.choice(recent)
        latest = next(step for step in reversed(steps) if actor in step.actors)
        question, answer = ask(walkers, actor, latest)
        facts = [step.fact for step in steps]
        yield Story(facts, question, answer, list(latest.supporting), task)


def _went(rng: random.Random, who: str, place: str) -> str:
    return f"{who} {rng.choice(VERBS['move'])} to the {place}"


def _turn_of_hints(walkers: Walkers, start: int, hint: Callable[..., Step]) -> list[Step]:
    """Tell a half of the moves as moves, a quarter by where they led, the others by `hint`."""
    steps = []
    for index in range(start, start + FACTS_PER_TURN):
        (actor,), place = walkers.draw(1)
        left = walkers.place[actor]
        walkers.move((actor,), place)
        drawn = walkers.rng.random()
        if drawn < 0.5:
            step = Step((actor,), place, f"{_went(walkers.rng, actor, place)}.", (index,))
        elif drawn < 0.75:
            step = Step((actor,), place, f"{actor} is in the {place}.", (index,))
        else:
            step = hint(walkers, actor, left, place, index)
        steps.append(step)
    return steps


def _denial(walkers: Walkers, actor: str, left: str, reached: str, index: int) -> Step:
    """Tell only that the actor left: a denial is always about the place the actor has just left."""
    fact = f"{actor} is {walkers.rng.choice(('not', 'no longer'))} in the {left}."
    return Step((actor,), reached, fact, (index,), denied=left)


def _alternative(walkers: Walkers, actor: str, left: str, reached: str, index: int) -> Step:
    # The originals draw the other place blindly, so that it may be the same or the one just left.
    offered = [reached, walkers.rng.choice(walkers.places)]
    walkers.rng.shuffle(offered)
    fact = f"{actor} is either in the {offered[0]} or the {offered[1]}."
    return Step((actor,), reached, fact, (index,), offered=tuple(offered))


def _ask_whether(walkers: Walkers, actor: str, latest: Step) -> tuple[str, str]:
    """Ask about the true place half of the time; after a denial, which hides it, about the place denied."""
    if latest.denied:
        return f"Is {actor} in the {latest.denied}?", "no"
    true = latest.reached
    place = true if walkers.rng.random() < 0.5 else walkers.elsewhere(true)
    if latest.offered:
        answer = "maybe" if place in latest.offered else "no"
    else:
        answer = "yes" if place == true else "no"
    return f"Is {actor} in the {place}?", answer


def _ask_where(walkers: Walkers, actor: str, latest: Step) -> tuple[str, str]:
    return f"Where is {actor}?", latest.reached


def _turn_of_pairs(walkers: Walkers, start: int) -> list[Step]:
    """Tell of two who go together, then of two again, not always the same ones."""
    steps = []
    for index in range(start, start + FACTS_PER_TURN):
        actors, place = walkers.draw(2)
        walkers.move(actors, place)
        fact = f"{_went(walkers.rng, ' and '.join(actors), place)}."
        steps.append(Step(actors, place, fact, (index,)))
    return steps


def _turn_with_pronoun(walkers: Walkers, start: int, count: int) -> list[Step]:
    """Tell of some who go somewhere and, in the next sentence, on from there."""
    actors, place = walkers.draw(count)
    walkers.move(actors, place)
    first = Step(actors, place, f"{_went(walkers.rng, ' and '.join(actors), place)}.", (start,))
    place = walkers.elsewhere(place)
    walkers.move(actors, place)
    pronoun = PRONOUNS[actors[0]] if count == 1 else "they"
    fact = f"{walkers.rng.choice(OPENINGS)} {_went(walkers.rng, pronoun, place)}."
    return [first, Step(actors, place, fact, (start, start + 1))]


@dataclass(frozen=True)
class Visit:
    """Where an actor went at a time, the latter an index into `TIMES`."""

    actor: str
    time: int
    place: str

    def tell(self, rng: random.Random) -> str:
        """Word the visit, its time first or last."""
        went, time = _went(rng, self.actor, self.place), TIMES[self.time]
        return f"{time.capitalize()} {went}." if rng.random() < 0.5 else f"{went} {time}."


def _tell_days(task: str, rng: random.Random) -> Iterator[Story]:
    """Tell of everybody's days, every turn's sentences out of order."""
    walkers = Walkers(TRAVELLERS, TOWN, rng)
    visits: list[Visit] = []  # as they happened
    told: list[Visit] = []
    facts: list[str] = []
    asked = 0
    while asked < QUESTIONS_PER_STORY:
        for _ in range(FACTS_PER_TURN):
            visits.append(_next_visit(walkers, visits))
        choices = [v for v in visits[-ATTENTION:] if _can_be_asked(v, visits)]
        if not choices:
            # Nobody has been anywhere twice: the turn grows by two more sentences.
            continue
        turn = visits[len(told) :]
        _derange(turn, rng)
        told += turn
        facts += [visit.tell(rng) for visit in turn]
        after = rng.choice(choices)
        before = _find(visits, after.actor, after.time - 1)
        question = f"Where was {after.actor} before the {after.place}?"
        supporting = [told.index(after), told.index(before)]
        asked += 1
        yield Story(list(facts), question, before.place, supporting, task)


def _next_visit(walkers: Walkers, visits: list[Visit]) -> Visit:
    """Let somebody whose day is not over go on."""
    while True:
        (actor,), place = walkers.draw(1)
        time = sum(visit.actor == actor for visit in visits)
        if time < len(TIMES):
            walkers.move((actor,), place)
            return Visit(actor, time, place)


def _can_be_asked(visit: Visit, visits: list[Visit]) -> bool:
    """Tell whether a visit has one before it and none to the same place after it."""
    again = any(
        v.actor == visit.actor and v.place == visit.place and v.time > visit.time for v in visits
    )
    return visit.time > 0 and not again


def _find(visits: list[Visit], actor: str, time: int) -> Visit:
    return next(visit for visit in visits if (visit.actor, visit.time) == (actor, time))


def _derange(turn: list[Visit], rng: random.Random) -> None:
    """Permute by one random cycle, as the originals do: two are always swapped, none stays put."""
    for index in range(len(turn) - 1, 0, -1):
        other = rng.randrange(index)
        turn[index], turn[other] = turn[other], turn[index]


@dataclass(frozen=True)
class Walk:
    """How one of qa9 to qa13 tells a turn, what it asks, of whom and where."""

    turn: Turn
    ask: Ask
    actors: tuple[str, ...] = ACTORS
    places: tuple[str, ...] = PLACES

    def begin(self, rng: random.Random) -> Walkers:
        return Walkers(self.actors, self.places, rng)

    def __call__(self, task: str, rng: random.Random) -> Iterator[Story]:
        """The questions of one story."""
        return _tell_walks(task, rng, self.begin(rng), self.turn, self.ask)


WALKS = {
    "qa9": Walk(lambda w, start: _turn_of_hints(w, start, _denial), _ask_whether),
    "qa10": Walk(
        lambda w, start: _turn_of_hints(w, start, _alternative), _ask_whether, TRAVELLERS, TOWN
    ),
    "qa11": Walk(lambda w, start: _turn_with_pronoun(w, start, 1), _ask_where),
    "qa12": Walk(_turn_of_pairs, _ask_where),
    "qa13": Walk(lambda w, start: _turn_with_pronoun(w, start, 2), _ask_where),
}

TELLERS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = {
    **WALKS,
    "qa14": _tell_days,
}
