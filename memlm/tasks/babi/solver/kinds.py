"""What holds for an animal because of its kind: qa15 (fears are told of kinds) and qa16 (colours).

In qa16 a colour is concluded from another animal of the kind. Where these differ, the original takes
the colour of the animal whose kind was told last, whatever the majority says and whichever colour was told
last; this explains every original question.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_FEAR = re.compile(r"(\w+) are afraid of (\w+)")
_KIND = re.compile(r"(\w+) is an? (\w+)")
_COLOUR = re.compile(r"(\w+) is (\w+)")
_SINGULAR = {"mice": "mouse", "sheep": "sheep", "geese": "goose"}


@dataclass
class Reading:
    """What has been read so far; names in lower case, as questions may write them so.

    kinds: name -> kind, in the order in which they were last told; fears: kind -> the feared kind.
    """

    kinds: dict[str, str] = field(default_factory=dict)
    colours: dict[str, str] = field(default_factory=dict)
    fears: dict[str, str] = field(default_factory=dict)

    def read(self, sentence: str) -> bool:
        if match := _FEAR.fullmatch(sentence):
            afraid, feared = match.groups()
            self.fears[_one(afraid)] = _one(feared)
        elif match := _KIND.fullmatch(sentence):
            name = match.group(1).lower()
            self.kinds.pop(name, None)
            self.kinds[name] = match.group(2).lower()
        elif match := _COLOUR.fullmatch(sentence):
            self.colours[match.group(1).lower()] = match.group(2)
        else:
            return False
        return True


def _one(animals: str) -> str:
    """The singular of an animal's plural."""
    animals = animals.lower()
    if animals in _SINGULAR:
        return _SINGULAR[animals]
    if animals.endswith("ves"):
        return f"{animals[:-3]}f"
    return animals.removesuffix("s")


def _fear(reading: Reading, name: str) -> str | None:
    return reading.fears.get(reading.kinds.get(name.lower(), ""))


def _colour(reading: Reading, name: str) -> str | None:
    name = name.lower()
    if name in reading.colours:
        return reading.colours[name]
    for other in reversed(reading.kinds):
        if reading.kinds[other] == reading.kinds.get(name) and other in reading.colours:
            return reading.colours[other]
    return None


QUESTIONS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r"What is (\w+) afraid of\?", _fear),
    (r"What color is (\w+)\?", _colour),
)
