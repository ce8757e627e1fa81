"""Who is where with what: qa1 to qa3 and qa5.

A drop by someone never seen taking the object proves that they carried it all along, and taking an
object from a known place proves where the taker stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

_MOVE = re.compile(r"(\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)")
_GET = re.compile(r"(\w+) (?:got|grabbed|took|picked up) the (\w+)(?: there)?")
_DROP = re.compile(r"(\w+) (?:dropped|left|discarded|put down) the (\w+)(?: there)?")
_GIVE = re.compile(r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)")


@dataclass
class Reading:
    """What has been read so far."""

    actor_trail: dict[str, list[str]] = field(default_factory=dict)
    object_trail: dict[str, list[str]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    gifts: list[tuple[str, str, str]] = field(default_factory=list)

    def read(self, sentence: str) -> bool:
        if match := _MOVE.fullmatch(sentence):
            _move(self, *match.groups())
        elif match := _GET.fullmatch(sentence):
            _get(self, *match.groups())
        elif match := _DROP.fullmatch(sentence):
            _drop(self, *match.groups())
        elif match := _GIVE.fullmatch(sentence):
            giver, thing, receiver = match.groups()
            self.gifts.append((giver, thing, receiver))
            self.holder[thing] = receiver
        else:
            return False
        return True


def _append(trail: list[str], places: Sequence[str]) -> None:
    for place in places:
        if not trail or trail[-1] != place:
            trail.append(place)


def _move(reading: Reading, actor: str, place: str) -> None:
    _append(reading.actor_trail.setdefault(actor, []), [place])
    for thing, holder in reading.holder.items():
        if holder == actor:
            _append(reading.object_trail.setdefault(thing, []), [place])


def _get(reading: Reading, actor: str, thing: str) -> None:
    reading.holder[thing] = actor
    stands = reading.actor_trail.setdefault(actor, [])
    lies = reading.object_trail.setdefault(thing, [])
    if stands:
        _append(lies, stands[-1:])
    else:
        _append(stands, lies[-1:])


def _drop(reading: Reading, actor: str, thing: str) -> None:
    trail = reading.object_trail.setdefault(thing, [])
    if reading.holder.pop(thing, None) != actor:
        _append(trail, reading.actor_trail.get(actor, []))


def _last(trail: list[str] | None) -> str | None:
    return trail[-1] if trail else None


def _before(reading: Reading, thing: str, place: str) -> str | None:
    trail = reading.object_trail.get(thing, [])
    for index in range(len(trail) - 1, 0, -1):
        if trail[index] == place:
            return trail[index - 1]
    return None


def _gift(
    reading: Reading, part: int, giver: str = "", thing: str = "", receiver: str = ""
) -> str | None:
    wanted = (giver, thing, receiver)
    for gift in reversed(reading.gifts):
        if all(want in ("", told) for want, told in zip(wanted, gift, strict=True)):
            return gift[part]
    return None


QUESTIONS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r"Where is the (\w+)\?", lambda r, thing: _last(r.object_trail.get(thing))),
    (r"Where is (\w+)\?", lambda r, actor: _last(r.actor_trail.get(actor))),
    (r"Where was the (\w+) before the (\w+)\?", _before),
    (r"What did (\w+) give to (\w+)\?", lambda r, a, b: _gift(r, 1, giver=a, receiver=b)),
    (r"Who gave the (\w+) to (\w+)\?", lambda r, o, b: _gift(r, 0, thing=o, receiver=b)),
    (r"Who gave the (\w+)\?", lambda r, o: _gift(r, 0, thing=o)),
    (r"Who received the (\w+)\?", lambda r, o: _gift(r, 2, thing=o)),
    (r"Who did (\w+) give the (\w+) to\?", lambda r, a, o: _gift(r, 2, giver=a, thing=o)),
)
