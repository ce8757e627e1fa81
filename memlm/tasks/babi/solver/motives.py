"""Why somebody went or took something, and where they will go: qa20.

Each state of mind has a place where it is cured and a thing that cures it. An act is explained by the
newest fitting state that was told before it, or, when the act itself is not among the facts, by the newest
fitting state overall.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

_STATE = re.compile(r"(\w+) is (hungry|thirsty|tired|bored)")
_MOVE = re.compile(r"(\w+) (?:moved|went|went back|journeyed|travelled) to the (\w+)")
_GET = re.compile(r"(\w+) (?:got|grabbed|took|picked up) the (\w+)(?: there)?")
_CURES = {
    "hungry": ("kitchen", "apple"),
    "thirsty": ("kitchen", "milk"),
    "tired": ("bedroom", "pajamas"),
    "bored": ("garden", "football"),
}


@dataclass
class Reading:
    """What has been read so far; names in lower case, as questions write them so.

    states: name -> states of mind, oldest first; reasons: (name, place or thing) -> the state that
    explains the newest going there or taking it, None when no told state does.
    """

    states: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def read(self, sentence: str) -> bool:
        if match := _STATE.fullmatch(sentence):
            self.states.setdefault(match.group(1).lower(), []).append(match.group(2))
        elif match := _MOVE.fullmatch(sentence) or _GET.fullmatch(sentence):
            name, wanted = match.group(1).lower(), match.group(2)
            self.reasons[(name, wanted)] = self.newest_fitting(name, wanted)
        else:
            return False
        return True

    def newest_fitting(self, name: str, wanted: str) -> str | None:
        """The newest state of mind that the wanted place or thing cures."""
        fitting = [state for state in self.states.get(name, []) if wanted in _CURES[state]]
        return fitting[-1] if fitting else None


def _destination(reading: Reading, name: str) -> str | None:
    states = reading.states.get(name.lower())
    return _CURES[states[-1]][0] if states else None


def _why(reading: Reading, name: str, wanted: str) -> str | None:
    name = name.lower()
    if (name, wanted) in reading.reasons:
        return reading.reasons[(name, wanted)]
    return reading.newest_fitting(name, wanted)


QUESTIONS: tuple[tuple[str, Callable[..., str | None]], ...] = (
    (r"Where will (\w+) go\?", _destination),
    (r"Why did (\w+) (?:go to|get) the (\w+)\?", _why),
)
