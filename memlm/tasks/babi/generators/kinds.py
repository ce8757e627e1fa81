"""qa15 and qa16: what is told about a kind of animal holds for every animal of the kind."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

from memlm.tasks.babi.story import Story

FEARFUL = ("Emily", "Gertrude", "Jessica", "Winona")
PLURALS = {"cat": "cats", "mouse": "mice", "sheep": "sheep", "wolf": "wolves"}
FEAR_QUESTIONS = 4
COLOURED = ("Bernhard", "Brian", "Greg", "Julius", "Lily")
ANIMALS = ("frog", "lion", "rhino", "swan")
COLOURS = ("gray", "green", "white", "yellow")
# How many animals the kind asked about has, including the one asked about: the original never asks about
# a kind of three.
ASKED_SIZES = (2, 4, 5)


def _fears(task: str, rng: random.Random) -> Iterator[Story]:
    """Tell whom each kind fears and who is of which kind; ask what somebody fears."""
    fears = {kind: rng.choice([k for k in PLURALS if k != kind]) for kind in PLURALS}
    kinds, order = _order_of_fears(rng)
    facts = [
        f"{PLURALS[item].capitalize()} are afraid of {PLURALS[fears[item]]}."
        if item in PLURALS
        else f"{item} is a {kinds[item]}."
        for item in order
    ]
    for _ in range(FEAR_QUESTIONS):
        name = rng.choice(FEARFUL)
        supporting = [order.index(name), order.index(kinds[name])]
        question = f"What is {name.lower()} afraid of?"
        yield Story(list(facts), question, fears[kinds[name]], supporting, task)


def _order_of_fears(rng: random.Random) -> tuple[dict[str, str], list[str]]:
    """Draw everyone's kind, and the order in which names and kinds are told about."""
    while True:
        kinds = {name: rng.choice(sorted(PLURALS)) for name in FEARFUL}
        order = rng.sample((*FEARFUL, *PLURALS), len(FEARFUL) + len(PLURALS))
        # A kind's fear is told before anyone of the kind. Drawing both anew, as the original does,
        # makes stories with few kinds likelier.
        if all(order.index(kinds[name]) < order.index(name) for name in FEARFUL):
            return kinds, order


def _colours(task: str, rng: random.Random) -> Iterator[Story]:
    """Tell the kinds and colours of five animals except one colour, which is asked for.

    The answer is the colour of the animal of the same kind whose kind was told last. As in the
    original, one story of twelve has other animals of that kind in other colours.
    """
    while True:
        order = _order_of_colours(rng)
        asked, _ = order.pop()
        kinds = {name: rng.choice(ANIMALS) for name in COLOURED}
        if Counter(kinds.values())[kinds[asked]] in ASKED_SIZES:
            break
    colours: dict[str, str] = {}
    known: list[str] = []  # whose kind has been told
    told: set[str] = set()  # whose colour has been told
    facts = []
    for name, tells_colour in order:
        if tells_colour:
            told.add(name)
            facts.append(f"{name} is {colours[name]}.")
            continue
        known.append(name)
        facts.append(f"{name} is a {kinds[name]}.")
        # An animal that joins a kind changes the colour of all its members whose colour was not told.
        drawn = rng.choice(COLOURS)
        colours |= {n: drawn for n in known if kinds[n] == kinds[name] and n not in told}
    peer = next(n for n in reversed(known) if n != asked and kinds[n] == kinds[asked])
    supporting = [
        order.index((asked, False)),
        order.index((peer, False)),
        order.index((peer, True)),
    ]
    yield Story(facts, f"What color is {asked}?", colours[peer], supporting, task)


def _order_of_colours(rng: random.Random) -> list[tuple[str, bool]]:
    """Draw (name, whether the colour is told or the kind) until both are told of all, kinds first."""
    order: list[tuple[str, bool]] = []
    tellable = [(name, False) for name in COLOURED]
    while tellable:
        item = tellable.pop(rng.randrange(len(tellable)))
        order.append(item)
        if not item[1]:
            tellable.append((item[0], True))
    return order


TELLERS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = {
    "qa15": _fears,
    "qa16": _colours,
}
