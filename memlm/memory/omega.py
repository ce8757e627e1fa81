"""Omega: a deep memory that learns a window of tokens at every step (Behrouz et al. 2025, ATLAS: OmegaNet).

It stands where `titans-mag` does, beside a layer's attention. At each token it descends on the errors of
the last c tokens together, so that what it holds of one is not at the mercy of the next; the features of
keys and queries include products of two of their numbers, and hidden layers have gates. M_t = (1 - alpha_t)
M_{t-1} - sum over the window of theta_i / c grad |M(phi(k_i)) - v_i|^2, without momentum unless asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from memlm.memory.base import MemoryConfig
from memlm.memory.parts.titans import TitansBranch, TitansBranchConfig


@dataclass(frozen=True, kw_only=True)
class OmegaConfig(TitansBranchConfig):
    """Options of Omega: those of `TitansBranchConfig`, with a window, quadratic features and gates.

    With window=1, key_features="linear", gated=False and momentum=True it is titans-mag. Features grow with
    the square of a head, so that heads have 16 numbers at most where num_heads and head_dim are open.
    """

    widest_head: ClassVar[int] = 16

    momentum: bool = False
    window: int = 4
    key_features: str = "quadratic"
    gated: bool = True

    @classmethod
    def paper(cls) -> Self:
        """Convolutions of 4, x + LN(.) four heads wide, no limit to a token's gradient.

        Second-hand, as is all that is known here of the paper; the window's length is not known.
        """
        return cls(conv_size=4, expansion=4, residual=True, max_surprise=None)


class Omega(TitansBranch):
    """A deep memory with a window of past losses, as a gate."""

    Config: ClassVar[type[MemoryConfig]] = OmegaConfig
