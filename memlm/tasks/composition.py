"""The rules by which a story fits into a length: ours, or those of the published code."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from memlm.tasks.lengths import format_length


@dataclass(frozen=True)
class Composition:
    """How a story and noise fill a length.

    reserve: tokens of a length left free for a prompt, none of length 0. share: how many facts and
    questions are allowed per token of the rest; 1 is no cap. decimal: k and M count thousands and millions.
    overflow: facts longer than the rest are told all the same, without noise; otherwise they do not fit.
    stretch: noise comes in stretches cut from random places of documents, this many characters long per
    token of noise, without the sentences cut at either end; None: stretches begin with a random sentence
    and run to the end of its document.
    """

    reserve: int = 0
    share: float = 1.0
    decimal: bool = False
    overflow: bool = False
    stretch: int | None = None

    def __post_init__(self) -> None:
        if self.reserve < 0:
            raise ValueError(f"reserve={self.reserve} must be at least 0 and below the length")
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share={self.share} must be above 0 and at most 1")
        if self.stretch is not None and self.stretch < 1:
            raise ValueError(f"stretch={self.stretch} must be at least 1 character, or None")

    @property
    def name(self) -> str | None:
        """The name of these rules; None when they have none."""
        return next((name for name, rules in COMPOSITIONS.items() if rules == self), None)

    def room(self, length: int) -> int:
        """Tokens for facts and noise in a document of `length`; 0 for the facts alone."""
        if length == 0:
            return 0
        whole = length
        for binary, thousands in ((2**20, 10**6), (2**10, 10**3)) if self.decimal else ():
            if length % binary == 0:
                whole = length // binary * thousands
                break
        if self.reserve >= whole:
            raise ValueError(
                f"reserve={self.reserve} must be at least 0 and below length "
                f"{format_length(length)}; use a longer length, or 0k for facts alone"
            )
        return whole - self.reserve

    def settings(self) -> str | dict[str, Any]:
        """The name, or the rules where they have none."""
        return self.name or asdict(self)


COMPOSITIONS: dict[str, Composition] = {
    "exact": Composition(),
    "published": Composition(reserve=300, share=1 / 8, decimal=True, overflow=True, stretch=10),
}


def composition_of(
    composition: str | Composition = "exact",
    *,
    reserve: int = 0,
    share: float = 1.0,
    position: tuple[float, float] = (0.0, 1.0),
    distance: int | None = None,
) -> Composition:
    """The rules of this name, or "exact" with another reserve and share.

    ValueError on an unknown name, and on settings that the published rules fix.
    """
    if isinstance(composition, Composition):
        rules = composition
    elif composition in COMPOSITIONS:
        rules = COMPOSITIONS[composition]
    else:
        raise ValueError(
            f"composition={composition!r} is unknown; use one of {', '.join(COMPOSITIONS)}"
        )
    own: dict[str, Any] = {
        name: value
        for name, value, default in (("reserve", reserve, 0), ("share", share, 1.0))
        if value != default
    }
    if own and rules != COMPOSITIONS["exact"]:
        given = ", ".join(f"{name}={value}" for name, value in own.items())
        raise ValueError(
            f"{given} given beside composition={rules.settings()!r}, which says what it reserves and "
            "allows by itself; leave one of them out"
        )
    start, end = position
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"position={position!r} must be two rising fractions between 0 and 1")
    if rules.name == "published" and (distance is not None or (start, end) != (0.0, 1.0)):
        placed = f"position={position!r}" if distance is None else f"distance={distance}"
        raise ValueError(
            f"{placed} places facts where the published samples do not; leave it out, or "
            "composition='published'"
        )
    return replace(rules, **own)
