"""The grammar of bAbI's sentences about actors: what happened, or was the case, to whom, and when.

Names, places and objects are whatever stands where the grammar expects one; only verbs and other small
words are listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["at", "not", "no longer", "either", "get", "drop", "give"]

_TIMES = ("yesterday", "this morning", "this afternoon", "this evening")
_TIME = re.compile(rf"\b(?:{'|'.join(_TIMES)})\b", re.IGNORECASE)
_OPENING = re.compile(r"^(?:afterwards|after that|following that|then),? +", re.IGNORECASE)
_ONE = r"(?P<who>\w+)"
_FORMS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    (
        "at",
        re.compile(
            r"(?P<who>\w+(?: and \w+)*) (?:moved|went|went back|journeyed|travelled) to the (\w+)"
        ),
    ),
    ("at", re.compile(rf"{_ONE} is in the (\w+)")),
    ("not", re.compile(rf"{_ONE} is not in the (\w+)")),
    ("no longer", re.compile(rf"{_ONE} is no longer in the (\w+)")),
    ("either", re.compile(rf"{_ONE} is either in the (\w+) or the (\w+)")),
    ("get", re.compile(rf"{_ONE} (?:got|grabbed|took|picked up) the (\w+)(?: there)?")),
    ("drop", re.compile(rf"{_ONE} (?:dropped|left|discarded|put down) the (\w+)(?: there)?")),
    ("give", re.compile(rf"{_ONE} (?:gave|handed|passed) the (\w+) to (\w+)")),
)


@dataclass(frozen=True)
class Happening:
    """One sentence: `what` holds its places or its object, and for a gift the receiver as well.

    `time` counts from yesterday on; a sentence that names no time goes with the one before it.
    """

    kind: Kind
    who: tuple[str, ...]
    what: tuple[str, ...]
    time: int


class Listener:
    """Understands sentences one after another: pronouns and times refer to earlier ones."""

    def __init__(self) -> None:
        self._time = 0
        self._meant: dict[str, tuple[str, ...]] = {}  # pronoun -> whom it would mean now

    def hear(self, sentence: str) -> Happening | None:
        """Understand a sentence, its full stop left out; None when its form is unknown."""
        time = _TIME.search(sentence)
        if time is not None:
            before, after = sentence[: time.start()].strip(), sentence[time.end() :].strip()
            sentence = f"{before} {after}".strip()
        sentence = _OPENING.sub("", sentence)
        for kind, form in _FORMS:
            match = form.fullmatch(sentence)
            if match is None:
                continue
            who = self._resolve(match["who"])
            if who is None:
                return None
            if time is not None:
                self._time = _TIMES.index(time.group().lower())
            return Happening(kind, who, match.groups()[1:], self._time)
        return None

    def _resolve(self, subject: str) -> tuple[str, ...] | None:
        """Return whom a subject names; None for a pronoun that fits nobody named before."""
        pronoun = subject.lower()
        if pronoun in ("he", "she", "they"):
            return self._meant.get(pronoun)
        who = tuple(subject.split(" and "))
        if len(who) > 1:
            self._meant["they"] = who
        else:
            self._meant["he"] = self._meant["she"] = who
        return who
