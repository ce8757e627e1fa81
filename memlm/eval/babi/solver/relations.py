"""Where things stand to each other: qa4."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_DIRECTION = re.compile(r"The (\w+) is (north|south|east|west) of the (\w+)")

_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass
class Reading:
    """neighbours: (direction, place) -> what stands there."""

    neighbours: dict[tuple[str, str], str] = field(default_factory=dict)

    def read(self, sentence: str) -> bool:
        match = _DIRECTION.fullmatch(sentence)
        if match is None:
            return False
        subject, direction, place = match.groups()
        self.neighbours[(direction, place)] = subject
        self.neighbours[(_OPPOSITE[direction], subject)] = place
        return True


QUESTIONS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r"What is (\w+) of the (\w+)\?", lambda r, d, place: r.neighbours.get((d, place))),
    (
        r"What is the (\w+) (north|south|east|west) of\?",
        lambda r, place, d: r.neighbours.get((_OPPOSITE[d], place)),
    ),
)
