"""Memora: a deep memory whose weights are shares (Behrouz et al. 2025, *It's All Connected*, MIRAS).

It stands where `titans-mag` does, beside a layer's attention, and learns without momentum. What each output
takes of its inputs are shares above zero of a constant sum: W_t = c softmax((1 - alpha_t) log W_{t-1} -
theta_t grad). What is held is log W, up to a number for each output that the softmax takes away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from memlm.memory.base import MemoryConfig
from memlm.memory.parts.titans import TitansBranch, TitansBranchConfig


@dataclass(frozen=True, kw_only=True)
class MemoraConfig(TitansBranchConfig):
    """Options of Memora: those of `TitansBranchConfig`, without momentum, its weights a softmax.

    Each token has weights of its own, so that chunks are shorter: 16 tokens, or the segment.
    """

    momentum: bool = False
    retention: str = "softmax"
    residual: bool = True

    own: ClassVar[Mapping[str, Any]] = {"momentum": False, "retention": "softmax"}
    longest_chunk: ClassVar[int] = 16

    @classmethod
    def paper(cls) -> Self:
        """Convolutions of 4, hidden layers four heads wide, no limit to a token's gradient.

        Second-hand, as is all that is known here of the paper.
        """
        return cls(conv_size=4, expansion=4, max_surprise=None)


class Memora(TitansBranch):
    """A deep memory whose weights are shares, as a gate."""

    Config: ClassVar[type[MemoryConfig]] = MemoraConfig
