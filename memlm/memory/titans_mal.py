"""Titans, memory as a layer: the memory stands before a layer of the base model (section 4.3).

x + M(x) goes into the layer, the persistent tokens before it. As in the paper's figure the memory is a
residual block of its own; what it does not know passes by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from memlm.memory.base import Inner, MemoryConfig, Site
from memlm.memory.parts.titans import Titans, TitansConfig, TitansState


@dataclass(frozen=True, kw_only=True)
class TitansMALConfig(TitansConfig):
    """Options of Titans MAL: those of `TitansConfig`."""


class TitansMAL(Titans):
    """Titans with memory as a layer."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = TitansMALConfig
    reads_inner: ClassVar[bool] = False
    # Without persistent tokens, which take a share of the attention, and at output_std=0: the defaults.
    neutral: ClassVar[bool] = True

    def forward(
        self,
        x: Tensor,
        state: TitansState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, TitansState]:
        answer, new = self.remember(x, state, mask)
        longer, real, count = self.with_persistent(x + answer, mask)
        return inner(longer, mask=real)[:, count:], (new if write else state)
