"""Titans, memory as a context: attention sees what the memory says to the segment (section 4.1).

Before a layer's attention the memory of the past segments is asked with every token; the answers stand
before the segment, after the persistent tokens, and attention runs over all of it: [P; h; x]. A token
sees the answers to its own and to earlier tokens of its segment, at those tokens' places, so that nothing
leaks back. What attention returns is written to the memory, which is read once more: o = y + gate * M(y).

The paper multiplies y by the gated answer without saying how; here the gated answer is added, or with
combine="multiply" becomes a sigmoid gate on y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memlm.memory.base import Continues, Dims, Inner, MemoryConfig, Site
from memlm.memory.parts.titans import COMBINATIONS, Titans, TitansBranchConfig, TitansState


@dataclass(frozen=True, kw_only=True)
class TitansMACConfig(TitansBranchConfig):
    """Options of Titans MAC: those of `TitansBranchConfig`, with 4 persistent tokens."""

    num_persistent_tokens: int = 4


class TitansMAC(Titans):
    """Titans with memory as a context."""

    site: ClassVar[Site] = "attention"
    Config: ClassVar[type[MemoryConfig]] = TitansMACConfig

    continues = Continues("again", reason="what the memory tells stands between the tokens")

    # The queries that ask before the attention have a convolution of their own.
    streams: ClassVar[int] = 4

    def __init__(self, config: TitansMACConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.combine = COMBINATIONS[config.combine]
        self.context = nn.Linear(self.memory.out.in_features, dims.hidden_size, bias=False)

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        return config.num_persistent_tokens + dims.segment_length

    def reset_parameters(self, embedding_std: float) -> None:
        super().reset_parameters(embedding_std)
        nn.init.normal_(self.context.weight, std=self.context.in_features**-0.5)

    def forward(
        self,
        x: Tensor,
        state: TitansState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, TitansState]:
        told, tail = self.memory.retrieve(x, state, mask)
        both = None if mask is None else torch.cat([mask, mask], dim=1)
        longer, real, count = self.with_persistent(torch.cat([self.context(told), x], dim=1), both)
        tokens = x.shape[1]
        # What the memory told of a token happens when the token does, and only the tokens go on.
        at = torch.arange(count + tokens, device=x.device)
        times = torch.cat([at, at[count:]])
        y = inner(longer, mask=real, times=times, last=tokens)[:, count + tokens :]
        answer, new = self.remember(y, state, mask)
        if new.tails:
            new = new._replace(tails=(*new.tails[:3], tail))
        return self.combine(y, answer), (new if write else state)
