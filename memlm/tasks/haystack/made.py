"""The haystack "made": sentences made up to be taken for facts, and what other haystacks have little of.

A memory that has only read documentation as noise opens at every kitchen. So here places, things and
verbs of bAbI stand in sentences that tell nothing about its people: other people who move about and
carry things, places that are mentioned, talk, numbers, and words in no order. None of them names
anybody of bAbI, says "he", "she" or "they", or where a place of bAbI lies: an answer never changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

TEXTS, SENTENCES = 1500, 60

PEOPLE = (
    "Alice Amir Anna Carlos Chen Clara David Dora Elena Erik Fatima Felix Grace Hana Henry Ivan Jonas "
    "Karen Laura Leo Lucas Maria Marta Mei Nadia Nina Omar Oscar Paul Peter Priya Ravi Robert Rosa "
    "Samuel Sara Simon Sofia Thomas Tom Vera Victor Walter Yuki"
).split()
ROLES = (
    "baker captain cook doctor driver farmer gardener guard guest librarian manager nurse painter pilot "
    "plumber porter singer student teacher tailor visitor waiter"
).split()
# bAbI's own, of all its tasks, and others.
KNOWN_PLACES = "bathroom bedroom garden hallway kitchen office park school cinema".split()
PLACES = (
    "airport attic balcony bakery bank barn basement beach bridge castle cellar church corner corridor "
    "court factory farm field forest garage gate harbour hospital hotel island library lobby market "
    "mill mountain museum pier porch restaurant river roof shop square stable stairs station street "
    "theatre tower tunnel valley village workshop yard"
).split()
KNOWN_THINGS = "apple football milk".split()
THINGS = (
    "bag basket blanket book bottle bowl box brush bucket camera candle chair clock coat coin cup drum "
    "envelope flag flower guitar hammer hat jacket kettle key knife lamp ladder letter map mirror "
    "newspaper orange painting pen pillow plate ring rope shoe spoon suitcase table ticket umbrella "
    "watch"
).split()
MOVES = "moved,went,went back,journeyed,travelled,walked,ran,drove,hurried,returned,came".split(",")
TAKES = "got,grabbed,took,picked up,found,bought,borrowed,carried".split(",")
LEAVES = "dropped,left,discarded,put down,lost,forgot".split(",")
GIVES = "gave,handed,passed,sent,showed,sold".split(",")
WORDS = (
    "about after again against all along also among any around as at away because before behind below "
    "better between big both bring but by call clear close cold come could dark day deep down each "
    "early end even every far few first follow for from full give go good great grow half hand hard "
    "have heavy here high hold house how idea if in into it just keep kind last late learn leave less "
    "let light line little live long look low make many may mean more most much must name near need "
    "never new next night no none north not now number of off old on once one only open or other our "
    "out over own part people place plan point question quiet rain read rest right round same say "
    "second see seem several short side since small snow so some soon south stand state still stop such "
    "than that the them then there thing think this those though through time to together too turn two "
    "under until up upon use very wait warm was water way well were west what when where which while "
    "white who whole why wind with word work world would year yet you young"
).split()


def made_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of each document, "made/KIND/NUMBER", the same at every call."""
    for number in range(TEXTS):
        kind = list(_KINDS)[number % len(_KINDS)]
        rng = random.Random(f"{kind}/{number}")
        yield f"made/{kind}/{number}", " ".join(_KINDS[kind](rng) for _ in range(SENTENCES))


def _person(rng: random.Random) -> str:
    return rng.choice(PEOPLE) if rng.random() < 0.7 else f"The {rng.choice(ROLES)}"


def _place(rng: random.Random) -> str:
    return rng.choice(KNOWN_PLACES if rng.random() < 0.5 else PLACES)


def _thing(rng: random.Random) -> str:
    return rng.choice(KNOWN_THINGS if rng.random() < 0.4 else THINGS)


def _others(rng: random.Random) -> str:
    """A fact of bAbI's form, about somebody else."""
    who, drawn = _person(rng), rng.random()
    there = rng.choice(("", "", " there"))
    if drawn < 0.45:
        return f"{who} {rng.choice(MOVES)} to the {_place(rng)}."
    if drawn < 0.6:
        return f"{who} {rng.choice(TAKES)} the {_thing(rng)}{there}."
    if drawn < 0.75:
        return f"{who} {rng.choice(LEAVES)} the {_thing(rng)}{there}."
    if drawn < 0.9:
        other = _person(rng).replace("The ", "the ")
        return f"{who} {rng.choice(GIVES)} the {_thing(rng)} to {other}."
    one, two = rng.sample(PLACES, 2)
    return f"The {one} is {rng.choice(('north', 'south', 'east', 'west'))} of the {two}."


def _mentions(rng: random.Random) -> str:
    """A place or a thing in passing."""
    place, thing = _place(rng), _thing(rng)
    return rng.choice(
        (
            f"The {place} was painted {rng.choice(('white', 'green', 'blue', 'yellow'))} last year.",
            f"Nobody had opened the windows of the {place} for weeks.",
            f"A new {place} was built next to the old {rng.choice(PLACES)}.",
            f"The door of the {place} was locked in the evening.",
            f"It took two days to repair the {place} after the storm.",
            f"The {thing} belonged to the {rng.choice(ROLES)} of the {rng.choice(PLACES)}.",
            f"There is no {thing} as old as this one.",
            f"Every {place} needs a good {thing}.",
            f"In the {place} hung a picture of the {rng.choice(PLACES)}.",
            f"Between the {place} and the {rng.choice(PLACES)} there was a long way to go.",
            f"The price of the {thing} rose by {rng.randint(2, 40)} percent.",
            f"We moved the meeting from the {place} to the {rng.choice(PLACES)}.",
        )
    )


def _talk(rng: random.Random) -> str:
    who, other, place, thing = _person(rng), rng.choice(ROLES), _place(rng), _thing(rng)
    return rng.choice(
        (
            f'"Where is the {thing}?" asked {who.replace("The ", "the ")}.',
            f'"I never go to the {place}," said the {other}.',
            f'"Did you see my {thing}?" "No, look behind the {rng.choice(PLACES)}."',
            f'"Who was in the {place} last night?" the {other} wanted to know.',
            f'"Give me the {thing} and go," said {who.replace("The ", "the ")} quietly.',
            f'"The {place} is closed," the {other} answered.',
        )
    )


def _numbers(rng: random.Random) -> str:
    row = [
        rng.choice(
            (str(rng.randint(0, 9999)), f"{rng.uniform(0, 100):.2f}", f"{rng.randint(1, 99)}%")
        )
        for _ in range(rng.randint(5, 14))
    ]
    return rng.choice(
        (", ".join(row) + ".", f"In {rng.randint(1500, 2020)} there were {row[0]} of them.")
    )


def _words(rng: random.Random) -> str:
    every = (WORDS, KNOWN_PLACES, KNOWN_THINGS, PLACES, THINGS, [w for w in MOVES if " " not in w])
    drawn = [rng.choice(every[0] if rng.random() < 0.6 else rng.choice(every)) for _ in range(12)]
    return " ".join(drawn[: rng.randint(4, 12)]).capitalize() + "."


_KINDS: dict[str, Callable[[random.Random], str]] = {
    "others": _others,
    "mentions": _mentions,
    "talk": _talk,
    "numbers": _numbers,
    "words": _words,
}
