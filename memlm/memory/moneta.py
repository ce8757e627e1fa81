"""Moneta: a deep memory under other norms (Behrouz et al. 2025, *It's All Connected*, MIRAS).

It stands where `titans-mag` does, beside a layer's attention, and learns without momentum. Errors cost the
sum of |e|^p; what the steps sum up to is A, and the weights are W = A / |A|_q^(q - 2), the norm taken where
a chunk starts. A_t = (1 - alpha_t) A_{t-1} - theta_t grad at W. Here p = 3 and q = 4, and A's norm counts
in units of the norm that its layer starts with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from memlm.memory.base import MemoryConfig
from memlm.memory.parts.titans import TitansBranch, TitansBranchConfig


@dataclass(frozen=True, kw_only=True)
class MonetaConfig(TitansBranchConfig):
    """Options of Moneta: those of `TitansBranchConfig`, without momentum, under norms of its own.

    With residual=False the last layer's W shrinks while A grows, and what is learned is a sum of outer
    products whatever the errors are: under the answer's own norm its length does not matter.
    """

    momentum: bool = False
    objective: str = "power"
    retention: str = "norm"
    residual: bool = True

    own: ClassVar[Mapping[str, Any]] = {
        "momentum": False,
        "objective": "power",
        "retention": "norm",
    }

    @classmethod
    def paper(cls) -> Self:
        """Convolutions of 4, hidden layers four heads wide, no limit to a token's gradient.

        Second-hand, as is all that is known here of the paper.
        """
        return cls(conv_size=4, expansion=4, max_surprise=None)


class Moneta(TitansBranch):
    """A deep memory under other norms, as a gate."""

    Config: ClassVar[type[MemoryConfig]] = MonetaConfig
