"""Transformer-XL: attention sees the keys and values of the tokens before the segment (Dai et al. 2019).

The paper caches hidden states and projects them again at every segment; here their keys and values are
kept, which spares the projection. They are kept without position and rotated by the backbone when they are
read: positions count from the oldest that is held, so no position grows with the document. A base with
absolute positions has them in its embeddings, and gets a learned offset for each place in the memory.

Gradients reach as many segments back as `bptt_depth` says; the paper's stop-gradient is a depth of 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from memlm.memory.base import (
    QKV,
    Continues,
    Dims,
    InnerHeads,
    Memory,
    MemoryConfig,
    Site,
    live_option,
)
from memlm.memory.parts.cache import held, length_kept, push


@dataclass(frozen=True, kw_only=True)
class TransformerXLConfig(MemoryConfig):
    """memory_length: tokens before the segment that attention sees.

    None picks a segment, or what the base model's positions leave beside one where that is less.
    read_dropout: in training, the share of rows whose attention does not see them, layer by layer (ours, so
    that another memory beside this one learns what attention would have answered); 1 is all rows.
    """

    memory_length: int | None = None
    read_dropout: float = live_option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """WikiText-103's, base size, in training: 150 tokens, as long as its segments."""
        return cls(memory_length=150)


class TransformerXLState(NamedTuple):
    """keys and values (B, G, N, dh), right-aligned; length (B,): how many of the N places are filled."""

    keys: Tensor
    values: Tensor
    length: Tensor


class TransformerXL(Memory):
    """Attention over the last `memory_length` tokens before the segment as well."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = TransformerXLConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("front")
    config: TransformerXLConfig

    def __init__(self, config: TransformerXLConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.memory_length is not None
        self.memory_length = config.memory_length
        self.offset = (
            None
            if dims.rotary
            else nn.Parameter(torch.empty(dims.num_kv_heads, config.memory_length, dims.head_dim))
        )

    @classmethod
    def resolve(cls, config: TransformerXLConfig, dims: Dims) -> TransformerXLConfig:
        if not 0 <= config.read_dropout <= 1:
            raise ValueError(f"read_dropout={config.read_dropout} must be from 0 to 1")
        return replace(config, memory_length=length_kept(config.memory_length, dims))

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return config.memory_length

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        return config.memory_length

    def reset_parameters(self, embedding_std: float) -> None:
        if self.offset is not None:
            nn.init.zeros_(self.offset)

    def init_state(self, batch_size: int) -> TransformerXLState:
        shape = (batch_size, self.dims.num_kv_heads, self.memory_length, self.dims.head_dim)
        return TransformerXLState(
            self.zeros(*shape), self.zeros(*shape), self.zeros(batch_size, dtype=torch.long)
        )

    def forward(
        self,
        x: QKV,
        state: TransformerXLState,
        inner: InnerHeads,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, TransformerXLState]:
        past = state.keys if self.offset is None else state.keys + self.offset
        k = torch.cat([past.to(x.k.dtype), x.k], dim=2)
        v = torch.cat([state.values.to(x.v.dtype), x.v], dim=2)
        real = held(state.length, self.memory_length)
        if self.training and self.config.read_dropout:
            real = real & (torch.rand(len(real), 1, device=real.device) >= self.config.read_dropout)
        present = real.new_ones(x.k.shape[0], x.k.shape[2]) if mask is None else mask
        y = inner(QKV(x.q, k, v), mask=torch.cat([real, present], dim=1))
        if not write:
            return y, state
        (keys, values), length = push((state.keys, state.values), state.length, (x.k, x.v), mask)
        return y, TransformerXLState(keys, values, length)
