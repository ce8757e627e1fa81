"""How things relate to each other: qa4 and qa19 (places), qa17 (shapes) and qa18 (sizes).

In qa4 and qa19 a neighbour is exactly one step away, and a path uses only neighbours that were told. In
qa17 a shape told to be above another is one step straight above it; for two shapes placed diagonally both
relations hold (above and to the left, say), and of two in one row neither is above. In qa18 sizes are
transitive, and to fit inside a thing is to be smaller.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

_DIRECTION = re.compile(r"The (.+) is (north|south|east|west) of the (.+)")
_POSITION = re.compile(r"The (.+) is (above|below|to the left of|to the right of) the (.+)")
_BIGGER = re.compile(r"The (.+) is bigger than the (.+)")
_FITS = re.compile(r"The (.+) fits inside the (.+)")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
_STEPS = {"above": (0, 1), "below": (0, -1), "to the left of": (-1, 0), "to the right of": (1, 0)}


@dataclass
class Reading:
    """What has been read so far, in told order.

    neighbours: place -> its neighbours, by direction; steps: shape -> the shapes told
    beside it, with the step that leads there; smaller: thing -> the things told to be smaller.
    """

    neighbours: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    steps: dict[str, list[tuple[int, int, str]]] = field(default_factory=dict)
    smaller: dict[str, list[str]] = field(default_factory=dict)

    def read(self, sentence: str) -> bool:
        if match := _DIRECTION.fullmatch(sentence):
            subject, direction, place = match.groups()
            self.neighbours.setdefault(place, []).append((direction, subject))
            self.neighbours.setdefault(subject, []).append((_OPPOSITE[direction], place))
        elif match := _POSITION.fullmatch(sentence):
            subject, relation, other = match.groups()
            x, y = _STEPS[relation]
            self.steps.setdefault(other, []).append((x, y, subject))
            self.steps.setdefault(subject, []).append((-x, -y, other))
        elif match := _BIGGER.fullmatch(sentence):
            self.smaller.setdefault(match.group(1), []).append(match.group(2))
        elif match := _FITS.fullmatch(sentence):
            self.smaller.setdefault(match.group(2), []).append(match.group(1))
        else:
            return False
        return True


def _neighbour(reading: Reading, direction: str, place: str) -> str | None:
    """What stands `direction` of `place`; the newest fact counts."""
    there = [name for way, name in reading.neighbours.get(place, []) if way == direction]
    return there[-1] if there else None


def _path(reading: Reading, start: str, goal: str) -> str | None:
    """The initials of the directions of the shortest walk; of equally short ones the first found."""
    walks: dict[str, list[str]] = {start: []}
    waiting = deque([start])
    while waiting and goal not in walks:
        place = waiting.popleft()
        for direction, name in reading.neighbours.get(place, []):
            if name not in walks:
                walks[name] = [*walks[place], direction[0]]
                waiting.append(name)
    return ",".join(walks.get(goal, [])) or None


def _stands(reading: Reading, subject: str, relation: str, other: str) -> str | None:
    """Whether `relation` holds between `subject` and `other`; None when nothing links them."""
    offsets = {other: (0, 0)}
    waiting = deque([other])
    while waiting:
        shape = waiting.popleft()
        for x, y, name in reading.steps.get(shape, []):
            if name not in offsets:
                offsets[name] = (offsets[shape][0] + x, offsets[shape][1] + y)
                waiting.append(name)
    if subject not in offsets:
        return None
    along, up = _STEPS[relation]
    return "yes" if offsets[subject][0] * along + offsets[subject][1] * up > 0 else "no"


def _is_bigger(reading: Reading, big: str, small: str) -> str | None:
    """Whether `big` is bigger than `small`; None when no chain of facts tells either way."""
    if small in _all_smaller(reading, big):
        return "yes"
    return "no" if big in _all_smaller(reading, small) else None


def _all_smaller(reading: Reading, thing: str) -> set[str]:
    found: set[str] = set()
    waiting = [thing]
    while waiting:
        new = set(reading.smaller.get(waiting.pop(), [])) - found
        found |= new
        waiting += new
    return found


QUESTIONS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r"What is (north|south|east|west) of the (.+)\?", _neighbour),
    (
        r"What is the (.+) (north|south|east|west) of\?",
        lambda r, place, direction: _neighbour(r, _OPPOSITE[direction], place),
    ),
    (r"How do you go from the (.+) to the (.+)\?", _path),
    (r"Is the (.+) (above|below|to the left of|to the right of) the (.+)\?", _stands),
    (r"Is the (.+) bigger than the (.+)\?", _is_bigger),
    (r"Does the (.+) fit in the (.+)\?", lambda r, small, big: _is_bigger(r, big, small)),
)
