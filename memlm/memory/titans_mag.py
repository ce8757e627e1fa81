"""Titans, memory as a gate: a memory branch beside a layer's attention (section 4.2).

Both branches read the layer's input. Attention has the persistent tokens before it and stays within
the segment (with `transformer-xl` attached as well it becomes the paper's sliding window); the memory reads
and writes every token. o = attention(x) + gate * M(x), or attention(x) * 2 sigmoid(gate * M(x)) with
combine="multiply": the paper multiplies, and leaves the nonlinearity open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memlm.memory.base import Dims, Inner, MemoryConfig, Site
from memlm.memory.parts.titans import COMBINATIONS, Titans, TitansBranchConfig, TitansState


@dataclass(frozen=True, kw_only=True)
class TitansMAGConfig(TitansBranchConfig):
    """Options of Titans MAG: those of `TitansBranchConfig`."""


class TitansMAG(Titans):
    """Titans with memory as a gate."""

    site: ClassVar[Site] = "attention"
    Config: ClassVar[type[MemoryConfig]] = TitansMAGConfig
    reads_inner: ClassVar[bool] = False
    # Without persistent tokens, which take a share of the attention, and at output_std=0: the defaults.
    neutral: ClassVar[bool] = True

    def __init__(self, config: TitansMAGConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.combine = COMBINATIONS[config.combine]

    def forward(
        self,
        x: Tensor,
        state: TitansState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, TitansState]:
        longer, real, count = self.with_persistent(x, mask)
        y = inner(longer, mask=real)[:, count:]
        answer, new = self.remember(x, state, mask)
        return self.combine(y, answer), (new if write else state)
