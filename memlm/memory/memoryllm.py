"""MemoryLLM: a pool of hidden states in front of every layer, of which a share is replaced at random.

Wang et al. 2024, *MemoryLLM: Towards Self-Updatable Large Language Models*. A layer's tokens see the pool
as if it were text before them. To write, the pool's newest K vectors and the segment pass the layer once
more; its last K outputs join the pool, and K others leave it by chance. What was written is forgotten
exponentially: of N vectors' places (1 - K / N)^t are still held after t segments.

The pool is a parameter in the published code, one for all rows. Here it is a state, empty when a document
begins, and what leaves it is decided by a counter in the state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.base import Continues, Dims, Inner, Memory, MemoryConfig, Site
from memlm.memory.parts.cache import held
from memlm.memory.parts.chance import BITS, draw, mixed, next_count
from memlm.memory.parts.checks import memory_tokens_for
from memlm.memory.parts.tokens import tokens_at

# The published sizes: a pool of 7,680 vectors, of which 256 are written at a time.
RATIO = 30


@dataclass(frozen=True, kw_only=True)
class MemoryLLMConfig(MemoryConfig):
    """Options of MemoryLLM.

    num_written: vectors written per segment and layer (K); None picks 16, or half a segment. pool_size:
    vectors a layer keeps (N, at least K); None picks 30 K, as published, or as many times K as the base
    model's positions leave beside a segment, since the pool's vectors take positions before it.
    """

    pool_size: int | None = None
    num_written: int | None = None


class MemoryLLMState(NamedTuple):
    """pool (B, N, D), right-aligned, oldest first; length (B,): how many vectors it holds.

    counter (B,) int64: what decides by chance which vectors leave (`memlm.memory.parts.chance`).
    """

    pool: Tensor
    length: Tensor
    counter: Tensor


class MemoryLLM(Memory):
    """A pool of hidden states in front of every layer."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = MemoryLLMConfig
    # An empty pool is not seen.
    neutral: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    repeats_inner: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("front")

    def __init__(self, config: MemoryLLMConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.pool_size is not None and config.num_written is not None
        self.pool_size, self.num_written = config.pool_size, config.num_written
        # Tells the layer that what it makes of these positions is to be kept.
        self.mark = nn.Parameter(torch.empty(dims.hidden_size))

    @classmethod
    def resolve(cls, config: MemoryLLMConfig, dims: Dims) -> MemoryLLMConfig:
        written = config.num_written
        if written is not None and written < 1:
            raise ValueError(
                f"num_written={written} writes nothing; give at least 1, or memory='none'"
            )
        if written is None:
            written = memory_tokens_for(None, dims)
        size = config.pool_size
        if size is None:
            spare = dims.spare_positions
            size = written * (RATIO if spare is None else max(1, min(RATIO, spare // written)))
        if size < written:
            raise ValueError(
                f"pool_size={size} cannot hold the num_written={written} vectors of one segment; use a "
                "larger pool, or write fewer"
            )
        return replace(config, pool_size=size, num_written=written)

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return config.pool_size

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        return config.pool_size

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.zeros_(self.mark)

    def init_state(self, batch_size: int) -> MemoryLLMState:
        length = self.zeros(batch_size, dtype=torch.long)
        return MemoryLLMState(
            self.zeros(batch_size, self.pool_size, self.dims.hidden_size),
            length,
            # Other vectors leave in other layers.
            torch.full_like(length, mixed(1 + (self.dims.layer or 0))),
        )

    def forward(
        self,
        x: Tensor,
        state: MemoryLLMState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, MemoryLLMState]:
        present = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        filled = held(state.length, self.pool_size)
        pool = state.pool.to(x.dtype)
        y = inner(torch.cat([pool, x], dim=1), mask=torch.cat([filled, present], dim=1))
        y = y[:, self.pool_size :]
        return y, (self.write(x, present, state, inner) if write else state)

    def write(
        self, x: Tensor, present: Tensor, state: MemoryLLMState, inner: Inner
    ) -> MemoryLLMState:
        """The state after a segment whose layer was given x (B, T, D), real where `present` (B, T) is."""
        count = self.num_written
        newest = state.pool[:, -count:].to(x.dtype)
        joined = torch.cat([newest, x], dim=1)
        real = torch.cat([held(state.length, self.pool_size)[:, -count:], present], dim=1)
        # The last real positions, which in a short segment may be those of the newest vectors.
        places = real.to(torch.uint8).argsort(dim=1, stable=True)[:, -count:]
        wanted = torch.zeros_like(real).scatter(1, places, True).unsqueeze(-1)
        out = inner(torch.where(wanted, joined + self.mark.to(x.dtype), joined), mask=real)
        return self.replaced(tokens_at(out, places), real.gather(1, places), state)

    def replaced(self, new: Tensor, real: Tensor, state: MemoryLLMState) -> MemoryLLMState:
        """The pool with `new` (B, K, D), where `real` (B, K), in the place of others."""
        joined = torch.cat([state.pool, new.to(state.pool.dtype)], dim=1)
        filled = torch.cat([held(state.length, self.pool_size), real], dim=1)
        places = torch.arange(filled.shape[1], device=filled.device)
        # No two are equal, so that the choice does not depend on how a device sorts.
        chances = draw(state.counter, places) * len(places) + places
        # What is empty goes first, and nothing new goes.
        chances = chances.masked_fill(~filled, (BITS + 1) * len(places))
        chances = torch.where(filled & (places >= self.pool_size), -1, chances)
        leaving = chances.topk(self.num_written, dim=1).indices
        stays = filled & ~torch.zeros_like(filled).scatter(1, leaving, True)
        order = stays.to(torch.uint8).argsort(dim=1, stable=True)[:, self.num_written :]
        stays = stays.gather(1, order)
        pool = tokens_at(joined, order).masked_fill(~stays.unsqueeze(-1), 0)
        return MemoryLLMState(pool, stays.sum(dim=1), next_count(state.counter))
