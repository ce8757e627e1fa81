"""A symbolic reader of bAbI's sentences that answers questions from facts alone.

It shares no code with the generators: it parses the words, replays what happened and deduces what
was not said, so that the supporting facts of a question are enough to answer it. The form of the
question decides which reader answers it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from memlm.tasks.babi.solver import actors, kinds, motives, relations


class Reading(Protocol):
    """What has been read so far, by one reader."""

    def read(self, sentence: str) -> bool:
        """Take in a fact, its full stop left out; False when its form is unknown."""


# A question's pattern, and what answers it from a reading and the pattern's groups; None: unknown.
Question = tuple[str, Callable[..., str | None]]

_READERS: tuple[tuple[Callable[[], Any], tuple[Question, ...]], ...] = (
    (actors.Reading, actors.QUESTIONS),
    (relations.Reading, relations.QUESTIONS),
    (kinds.Reading, kinds.QUESTIONS),
    (motives.Reading, motives.QUESTIONS),
)


def solve(facts: Sequence[str], question: str) -> str:
    """Answer `question` from `facts`; ValueError on a form bAbI does not have, or without an answer."""
    asked = question.strip()
    for reader, questions in _READERS:
        for pattern, answer in questions:
            match = re.fullmatch(pattern, asked)
            if match is None:
                continue
            reading = reader()
            for fact in facts:
                if not reading.read(fact.strip().rstrip(".")):
                    raise ValueError(
                        f"cannot parse the fact {fact!r}; the question {asked!r} belongs to other "
                        "sentence forms of bAbI"
                    )
            found = answer(reading, *match.groups())
            if found is None:
                raise ValueError(f"the {len(facts)} facts do not answer {asked!r}")
            return found
    raise ValueError(f"cannot parse the question {asked!r}; solve covers the forms of bAbI")
