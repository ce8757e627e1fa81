"""What several commands print: files written, and where a passage stands."""

from __future__ import annotations

import os
from collections.abc import Iterable


def print_written(paths: Iterable[str | os.PathLike[str]]) -> None:
    """One line for each file or folder."""
    for path in paths:
        print(f"written: {path}")


def place_of(document: str | None, start: int | None) -> str:
    """Where a passage stands: its document, and the character it starts at where that is known."""
    return f"{document or 'what was read'}{'' if start is None else f', character {start:,}'}"


def shorten(text: str) -> str:
    """`text` on one line of at most 160 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 160 else f"{flat[:157]}..."
