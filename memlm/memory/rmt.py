"""RMT: memory tokens before and after each segment (Bulatov, Kuratov, Burtsev 2022, section 3.2).

The decoder reads [M; x; M]: tokens see the leading (read) copy, the trailing (write) copy sees
everything, and its last hidden states are the next segment's M. Without writing, the trailing copy is
left out: under the causal mask no token sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from memlm.memory.base import Continues, Dims, Inner, Memory, MemoryConfig, Site
from memlm.memory.parts.checks import memory_tokens_for
from memlm.memory.parts.memory_tokens import around, check_decoder_memory


@dataclass(frozen=True, kw_only=True)
class RMTConfig(MemoryConfig):
    """num_memory_tokens: vectors carried from segment to segment; None picks 16, or half a segment."""

    num_memory_tokens: int | None = None

    @classmethod
    def paper(cls) -> Self:
        """16 tokens, as in the authors' long runs on BABILong (segments of 512; Kuratov et al. 2024)."""
        return cls(num_memory_tokens=16)


class RMTState(NamedTuple):
    """memory (B, M, D): what the next segment reads."""

    memory: Tensor


class RMT(Memory):
    """Recurrent Memory Transformer."""

    site: ClassVar[Site] = "model"
    Config: ClassVar[type[MemoryConfig]] = RMTConfig
    accumulates: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("front")

    def __init__(self, config: RMTConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_memory_tokens is not None
        self.num_memory_tokens = config.num_memory_tokens
        self.initial_memory = nn.Parameter(torch.empty(config.num_memory_tokens, dims.hidden_size))

    @classmethod
    def resolve(cls, config: RMTConfig, dims: Dims) -> RMTConfig:
        check_decoder_memory("rmt", config, dims)
        return replace(config, num_memory_tokens=memory_tokens_for(config.num_memory_tokens, dims))

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return 2 * config.num_memory_tokens

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.normal_(self.initial_memory, std=embedding_std)

    def init_state(self, batch_size: int) -> RMTState:
        return RMTState(self.rows_of(self.initial_memory, batch_size))

    def forward(
        self, x: Tensor, state: RMTState, inner: Inner, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, RMTState]:
        memory = state.memory.to(x.dtype)
        y, new = around(memory, x, memory if write else None, inner, mask)
        return y, RMTState(new) if write else state
