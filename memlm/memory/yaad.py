"""Yaad: a deep memory that outliers do not drag along (Behrouz et al. 2025, *It's All Connected*, MIRAS).

It stands where `titans-mag` does, beside a layer's attention, and learns without momentum. A token's error
counts by its square up to a bound and by its size beyond (Huber), so that no token pulls harder than its
bound; the bound is a function of the token. Retention is that of Titans: M_t = (1 - alpha_t) M_{t-1} -
theta_t g_t.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from memlm.memory.base import MemoryConfig
from memlm.memory.parts.titans import TitansBranch, TitansBranchConfig


@dataclass(frozen=True, kw_only=True)
class YaadConfig(TitansBranchConfig):
    """Options of Yaad: those of `TitansBranchConfig`, without momentum and with Huber's objective."""

    momentum: bool = False
    objective: str = "huber"

    own: ClassVar[Mapping[str, Any]] = {"momentum": False, "objective": "huber"}

    @classmethod
    def paper(cls) -> Self:
        """Convolutions of 4, x + LN(.) four heads wide, no limit to a token's gradient.

        Second-hand, as is all that is known here of the paper.
        """
        return cls(conv_size=4, expansion=4, residual=True, max_surprise=None)


class Yaad(TitansBranch):
    """A deep memory with Huber's objective, as a gate."""

    Config: ClassVar[type[MemoryConfig]] = YaadConfig
