"""Lengths of documents in written form: "0k", "4k" (4,096), "1M" (2**20) tokens."""

from __future__ import annotations

import re

_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([kKmM]?)")
_UNITS = {"": 1, "k": 2**10, "m": 2**20}


def parse_length(length: str | int) -> int:
    """Return the tokens meant by "0k", "4k" (4,096), "1M" (2**20), a plain number or an int."""
    match = _LENGTH.fullmatch(str(length).strip())
    tokens = float(match.group(1)) * _UNITS[match.group(2).lower()] if match else -1.0
    if isinstance(length, bool) or tokens < 0 or tokens != int(tokens):
        raise ValueError(
            f"unknown length {length!r}; write whole tokens as '0k', '4k', '128k', '1M' or 4096"
        )
    return int(tokens)


def format_length(tokens: str | int) -> str:
    """Write a length in its shortest form: 4096 is "4k", 2**20 is "1M", 0 is "0k"."""
    count = parse_length(tokens)
    if count == 0:
        return "0k"
    if count % 2**20 == 0:
        return f"{count // 2**20}M"
    return f"{count // 2**10}k" if count % 2**10 == 0 else str(count)
