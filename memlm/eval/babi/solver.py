"""A symbolic reader of bAbI's sentences that answers questions from facts alone.

It shares no code with the generators: it parses the words, replays what happened and deduces what
was not said. A drop by someone never seen taking the object proves that they carried it all along,
and taking an object from a known place proves where the taker stands; so the supporting facts of a
question are enough to answer it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_MOVE = re.compile(r"(\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)")
_GET = re.compile(r"(\w+) (?:got|grabbed|took|picked up) the (\w+)(?: there)?")
_DROP = re.compile(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)(?: there)?")
_GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)")
_RELATION = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)")

_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass
class _Reading:
    """What has been read so far."""

    actor_trail: dict[str, list[str]] = field(default_factory=dict)
    object_trail: dict[str, list[str]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    gifts: list[tuple[str, str, str]] = field(default_factory=list)
    relations: dict[tuple[str, str], str] = field(default_factory=dict)


def solve(facts: Sequence[str], question: str) -> str:
    """Answer `question` from `facts`; covers the sentence and question forms of qa1 to qa5."""
    reading = _Reading()
    for fact in facts:
        _read(reading, fact)
    asked = question.strip()
    for pattern, answer in _QUESTIONS:
        match = re.fullmatch(pattern, asked)
        if match:
            found = answer(reading, *match.groups())
            if found is None:
                raise ValueError(f"the {len(facts)} facts do not answer {asked!r}")
            return found
    raise ValueError(
        f"cannot parse the question {asked!r}; solve covers the question forms of qa1 to qa5"
    )


def _read(reading: _Reading, fact: str) -> None:
    sentence = fact.strip().rstrip(".")
    if match := _MOVE.fullmatch(sentence):
        _move(reading, *match.groups())
    elif match := _GET.fullmatch(sentence):
        _get(reading, *match.groups())
    elif match := _DROP.fullmatch(sentence):
        _drop(reading, *match.groups())
    elif match := _GIVE.fullmatch(sentence):
        giver, thing, receiver = match.groups()
        reading.gifts.append((giver, thing, receiver))
        reading.holder[thing] = receiver
    elif match := _RELATION.fullmatch(sentence):
        subject, direction, place = match.groups()
        reading.relations[(direction, place)] = subject
        reading.relations[(_OPPOSITE[direction], subject)] = place
    else:
        raise ValueError(
            f"cannot parse the fact {fact!r}; solve covers the sentence forms of qa1 to qa5"
        )


def _append(trail: list[str], places: Sequence[str]) -> None:
    for place in places:
        if not trail or trail[-1] != place:
            trail.append(place)


def _move(reading: _Reading, actor: str, place: str) -> None:
    _append(reading.actor_trail.setdefault(actor, []), [place])
    for thing, holder in reading.holder.items():
        if holder == actor:
            _append(reading.object_trail.setdefault(thing, []), [place])


def _get(reading: _Reading, actor: str, thing: str) -> None:
    reading.holder[thing] = actor
    stands = reading.actor_trail.setdefault(actor, [])
    lies = reading.object_trail.setdefault(thing, [])
    if stands:
        _append(lies, stands[-1:])
    else:
        _append(stands, lies[-1:])


def _drop(reading: _Reading, actor: str, thing: str) -> None:
    trail = reading.object_trail.setdefault(thing, [])
    if reading.holder.pop(thing, None) != actor:
        _append(trail, reading.actor_trail.get(actor, []))


def _last(trail: list[str] | None) -> str | None:
    return trail[-1] if trail else None


def _before(reading: _Reading, thing: str, place: str) -> str | None:
    trail = reading.object_trail.get(thing, [])
    for index in range(len(trail) - 1, 0, -1):
        if trail[index] == place:
            return trail[index - 1]
    return None


def _gift(
    reading: _Reading, part: int, giver: str = "", thing: str = "", receiver: str = ""
) -> str | None:
    wanted = (giver, thing, receiver)
    for gift in reversed(reading.gifts):
        if all(want in ("", told) for want, told in zip(wanted, gift, strict=True)):
            return gift[part]
    return None


_QUESTIONS = (
    (r"Where is the (\w+)\?", lambda r, thing: _last(r.object_trail.get(thing))),
    (r"Where is (\w+)\?", lambda r, actor: _last(r.actor_trail.get(actor))),
    (r"Where was the (\w+) before the (\w+)\?", _before),
    (r"What is (\w+) of the (\w+)\?", lambda r, d, place: r.relations.get((d, place))),
    (
        r"What is the (\w+) (north|south|east|west) of\?",
        lambda r, place, d: r.relations.get((_OPPOSITE[d], place)),
    ),
    (r"What did (\w+) give to (\w+)\?", lambda r, a, b: _gift(r, 1, giver=a, receiver=b)),
    (r"Who gave the (\w+) to (\w+)\?", lambda r, o, b: _gift(r, 0, thing=o, receiver=b)),
    (r"Who gave the (\w+)\?", lambda r, o: _gift(r, 0, thing=o)),
    (r"Who received the (\w+)\?", lambda r, o: _gift(r, 2, thing=o)),
    (r"Who did (\w+) give the (\w+) to\?", lambda r, a, o: _gift(r, 2, giver=a, thing=o)),
)
