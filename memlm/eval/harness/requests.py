"""The harness's requests in tokens, grouped by what they begin with, and how answers are generated."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Names that tasks give to the length of an answer; the first one given counts.
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of sampling that greedy decoding has no use for.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TokenRequest:
    """A request in tokens. ids: what the model reads. whole: how many of those come before the segment
    with the first prediction that counts. targets: what is to be predicted, at the last of the ids."""

    index: int
    ids: Ids
    whole: int
    targets: Ids

    @property
    def rest(self) -> Ids:
        return self.ids[self.whole :]


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated: where it stops, and the other arguments of `generate`."""

    stops: tuple[str, ...]
    limit: int
    options: dict[str, Any]


def families_of(rows: Sequence[TokenRequest]) -> list[list[TokenRequest]]:
    """Rows with the same whole segments together, the longest first.

    The order depends only on what the rows hold, so batches do not depend on the order of requests.
    """
    known = {row.index: digest_of(row.ids) for row in rows}
    found: dict[bytes, list[TokenRequest]] = {}
    for row in sorted(rows, key=lambda row: (-row.whole, -len(row.ids), known[row.index])):
        found.setdefault(digest_of(row.ids[: row.whole]), []).append(row)
    return list(found.values())


def digest_of(ids: Ids) -> bytes:
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


def decoding_of(given: dict[str, Any], default_limit: int) -> Decoding:
    """Read a task's `generation_kwargs`. ValueError on what makes no sense."""
    options = dict(given)
    until = options.pop("until", None)
    stops = [until] if isinstance(until, str) else list(until or [])
    if not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"until={until!r} must be a string or a list of strings")
    limits = [options.pop(name, None) for name in _LIMITS]
    limit = next((value for value in limits if value is not None), default_limit)
    temperature = options.get("temperature")
    sample = options.pop("do_sample", None)
    sample = bool(temperature) if sample is None else bool(sample)
    if sample and temperature is not None and not float(temperature) > 0:
        raise ValueError(
            f"temperature={temperature} with do_sample=True; give a temperature above 0, or "
            "do_sample=False"
        )
    if not sample:
        options = {name: value for name, value in options.items() if name not in _SAMPLING}
    options["do_sample"] = sample
    return Decoding(tuple(filter(None, stops)), count_of("max_gen_toks", limit), options)


def count_of(name: str, value: Any) -> int:
    """A count of at least 1, perhaps written as text. ValueError for anything else ("auto")."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    return number
