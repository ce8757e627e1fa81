"""qa4, qa17, qa18 and qa19: how things are placed relative to each other, and which is bigger."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from memlm.tasks.babi.generators.world import DIRECTIONS, PLACES
from memlm.tasks.babi.story import Story

# Steps in the plane, x to the east or right, y to the north or up.
COMPASS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
POSITIONS = {
    "above": (0, 1),
    "below": (0, -1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
SHAPES = (
    "blue square",
    "pink rectangle",
    "red sphere",
    "red square",
    "triangle",
    "yellow square",
)
# Chocolates are always smaller than containers; the order of the containers is drawn anew.
CHOCOLATES = ("chocolate", "box of chocolates")
CONTAINERS = ("box", "chest", "container", "suitcase")
POSITION_QUESTIONS = 8
SIZE_QUESTIONS = 5
FACTS_PER_BLOCK = 5
# How often the original tries to find a question about sizes before it tells another block of facts.
TRIES = 20
DECOYS = 3

Place = tuple[int, int]


def place_on_a_line(rng: random.Random) -> list[tuple[str, str, str]]:
    """Two facts on three places in a line, as (subject, direction, place): a middle, and its two ends."""
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
    return told


def tell_placement(subject: str, direction: str, place: str) -> str:
    """A fact as bAbI words it."""
    return f"The {subject} is {direction} of the {place}."


def _directions(task: str, rng: random.Random) -> Iterator[Story]:
    """Tell of three places on a line; ask for the subject of one of the two facts."""
    told = place_on_a_line(rng)
    index = rng.randrange(2)
    subject, relation, place = told[index]
    question = (
        f"What is {relation} of the {place}?"
        if rng.random() < 0.5
        else f"What is the {place} {DIRECTIONS[relation]} of?"
    )
    facts = [tell_placement(*fact) for fact in told]
    yield Story(facts, question, subject, [index], task)


def _positions(task: str, rng: random.Random) -> Iterator[Story]:
    """Tell of two shapes beside a third; ask how the two are placed relative to each other."""
    middle, *ends = rng.sample(SHAPES, 3)
    spots = dict(zip(ends, rng.sample(sorted(POSITIONS.values()), 2), strict=True))
    facts = []
    for end, (x, y) in spots.items():
        # The original makes the middle the subject of a fact two times in three.
        subject, other, offset = (
            (middle, end, (-x, -y)) if rng.random() < 2 / 3 else (end, middle, (x, y))
        )
        facts.append(f"The {subject} is {_relation(offset)} the {other}.")
    for _ in range(POSITION_QUESTIONS):
        first, second = rng.sample(range(2), 2)
        (x, y), (to_x, to_y) = spots[ends[first]], spots[ends[second]]
        holding = {r for r, (a, b) in POSITIONS.items() if (x - to_x) * a + (y - to_y) * b > 0}
        # Yes or no is drawn first: for two shapes in one row there are three relations to deny.
        answer = rng.choice(("yes", "no"))
        relation = rng.choice([r for r in POSITIONS if (r in holding) == (answer == "yes")])
        question = f"Is the {ends[first]} {relation} the {ends[second]}?"
        yield Story(list(facts), question, answer, [first, second], task)


def _relation(offset: Place) -> str:
    return next(relation for relation, step in POSITIONS.items() if step == offset)


def _sizes(task: str, rng: random.Random) -> Iterator[Story]:
    """Compare things in pairs, a block of facts at a time, until five questions in a row are found."""
    things = [*CHOCOLATES, *rng.sample(CONTAINERS, len(CONTAINERS))]
    told: list[tuple[int, int]] = []  # (the bigger, the smaller)
    facts: list[str] = []
    asked = 0
    while asked < SIZE_QUESTIONS:
        asked = 0
        for _ in range(FACTS_PER_BLOCK):
            small, big = sorted(rng.sample(range(len(things)), 2))
            told.append((big, small))
            facts.append(
                f"The {things[big]} is bigger than the {things[small]}."
                if rng.random() < 0.5
                else f"The {things[small]} fits inside the {things[big]}."
            )
        while asked < SIZE_QUESTIONS and (chain := _chain(told, rng)) is not None:
            asked += 1
            answer, first, second = chain
            # The first fact is about the one that is asked to be the bigger.
            side = 0 if answer == "yes" else 1
            bigger, smaller = things[told[first][side]], things[told[second][1 - side]]
            question = (
                f"Is the {bigger} bigger than the {smaller}?"
                if rng.random() < 0.5
                else f"Does the {smaller} fit in the {bigger}?"
            )
            yield Story(list(facts), question, answer, [first, second], task)


def _chain(told: list[tuple[int, int]], rng: random.Random) -> tuple[str, int, int] | None:
    """Draw an answer and two facts that prove it; None when no draw found such facts."""
    for _ in range(TRIES):
        answer, first = rng.choice(("yes", "no")), rng.randrange(len(told))
        big, small = told[first]
        for second, (other_big, other_small) in enumerate(told):
            if (small == other_big) if answer == "yes" else (big == other_small):
                return answer, first, second
    return None


def _paths(task: str, rng: random.Random) -> Iterator[Story]:
    """Tell of a path of two steps and of three places beside it; ask for the path."""
    names = rng.sample(PLACES, len(PLACES))
    spots, links = _map(rng)
    told = _walk_links(links, rng)
    facts = []
    for subject, other in told:
        way = _way(spots[other], spots[subject])
        facts.append(f"The {names[subject]} is {way} of the {names[other]}.")
    question = f"How do you go from the {names[0]} to the {names[2]}?"
    answer = ",".join(_way(spots[a], spots[b])[0] for a, b in links[:2])
    supporting = [
        next(index for index, ends in enumerate(told) if set(ends) == set(link))
        for link in links[:2]
    ]
    yield Story(facts, question, answer, supporting, task)


def _map(rng: random.Random) -> tuple[list[Place], list[tuple[int, int]]]:
    """Draw where six places lie, the first three in a path, and which of them are told as neighbours.

    In one original story of fourteen two places fall on one spot; ours are always apart.
    """
    start = (0, 0)
    middle = rng.choice(_around(start))
    path = [start, middle, rng.choice([spot for spot in _around(middle) if spot != start])]
    free = [
        (spot, index) for index in range(3) for spot in _around(path[index]) if spot not in path
    ]
    while True:
        decoys = rng.sample(free, DECOYS)
        spots = path + [spot for spot, _ in decoys]
        if len(set(spots)) == len(spots):
            break
    beside = [(index, 3 + number) for number, (_, index) in enumerate(decoys)]
    return spots, [(0, 1), (1, 2), *beside]


def _around(spot: Place) -> list[Place]:
    return [(spot[0] + x, spot[1] + y) for x, y in COMPASS.values()]


def _way(start: Place, end: Place) -> str:
    step = (end[0] - start[0], end[1] - start[1])
    return next(direction for direction, offset in COMPASS.items() if offset == step)


def _walk_links(links: list[tuple[int, int]], rng: random.Random) -> list[tuple[int, int]]:
    """Order the links as the original does, each as (subject, the other).

    It draws a place and one of its neighbours until the pair is new: places with few neighbours are told
    early and become subjects, so that the path tends to come last.
    """
    told: list[tuple[int, int]] = []
    while len(told) < len(links):
        subject = rng.randrange(len(links) + 1)
        link = rng.choice([link for link in links if subject in link])
        other = link[0] if link[1] == subject else link[1]
        if (subject, other) not in told and (other, subject) not in told:
            told.append((subject, other))
    return told


TELLERS: dict[str, Callable[[str, random.Random], Iterator[Story]]] = {
    "qa4": _directions,
    "qa17": _positions,
    "qa18": _sizes,
    "qa19": _paths,
}
