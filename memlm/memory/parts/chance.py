"""Randomness that is a function of the state: the same document gives the same numbers, on every machine.

A row carries a counter, and what is drawn is a hash of it. Nothing is drawn from torch's generators, so a
state that is saved, forked or run in another batch goes on as it would have. Integers below 2^32 are kept
in int64, where their products with constants below 2^31 fit.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

BITS = 0xFFFFFFFF
Number = TypeVar("Number", int, Tensor)


def mixed(value: Number) -> Number:
    """A number from 0 to 2^32 - 1 in which every bit depends on all bits of `value`, of that range."""
    value = ((value >> 16) ^ value) * 0x45D9F3B & BITS
    value = ((value >> 16) ^ value) * 0x45D9F3B & BITS
    return (value >> 16) ^ value


def next_count(count: Tensor) -> Tensor:
    """The counter after `count`: all 2^32 numbers once, in an order without a beginning.

    Not one more each time, so that a counter after a long document is as large as one after a short.
    """
    return (count * 1664525 + 1013904223) & BITS


def draw(count: Tensor, places: Tensor) -> Tensor:
    """(B, n) numbers from 0 to 2^32 - 1 for the rows' counters (B,) and places (n,), as if by chance."""
    return mixed(mixed(count).unsqueeze(1) ^ mixed(places + 1))
