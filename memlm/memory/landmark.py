"""Landmark attention: queries read whole blocks of the past, found by one key that stands for each
(Mohtashami, Jaggi 2023, *Landmark Attention: Random-Access Infinite Context Length for Transformers*).

The tokens before the segment are kept in blocks of fixed size, their keys without position. The mean key
of a block is its landmark. Each query of each head picks the `top_k` blocks whose landmarks suit it best,
and reads them in a grouped softmax (section 3.1): landmarks stand beside the segment's own keys in one
softmax, and what a landmark gets is shared out among the tokens of its block by a softmax of their own.

This is the form without training: the paper puts a token of its own behind every block, and trains its key
to stand for the block. Blocks that are read all stand at the place of the segment's first token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from memlm.memory.base import (
    QKV,
    Continues,
    Dims,
    InnerHeads,
    Memory,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
)
from memlm.memory.parts.cache import block_means, push_blocks
from memlm.memory.parts.checks import check_least
from memlm.memory.parts.retrieved import (
    Blocks,
    attend_in_all,
    attend_to_copies,
    mixed,
    none,
    read_in_parts,
    share,
)

# Numbers that a read holds at once: 16 MiB in float32, which a large cache holds.
NUMBERS = 2**22
# How many times what a query reads the store may be, for products with all of it to cost less than a copy
# of what is read. Measured on one core at 64 numbers a key (docs/log.md).
COPIED = 24


@dataclass(frozen=True, kw_only=True)
class LandmarkConfig(MemoryConfig):
    """Options of landmark attention.

    num_blocks: blocks a layer keeps, the oldest leaving first. block_length: tokens of a block. top_k:
    blocks each query reads at most. grouped: whether a block weighs in the softmax what its landmark does,
    as in the paper; without, what its tokens do, so that with all blocks read it is dense attention.
    """

    num_blocks: int = 64
    block_length: int = 50
    top_k: int = option(4)
    grouped: bool = option(True)

    @classmethod
    def paper(cls) -> Self:
        """The published pass-key script for LLaMA 7B: five blocks of 50; its cache is unbounded."""
        return cls(block_length=50, top_k=5)


class LandmarkState(NamedTuple):
    """keys and values (B, G, N, dh), left-aligned, N = num_blocks block_length; length (B,) are filled."""

    keys: Tensor
    values: Tensor
    length: Tensor


class Landmark(Memory):
    """Attention to a few whole blocks of the past, found by their mean keys."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = LandmarkConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("read")
    joins_softmax: ClassVar[bool] = True
    config: LandmarkConfig

    @classmethod
    def resolve(cls, config: LandmarkConfig, dims: Dims) -> LandmarkConfig:
        check_least(config, {"num_blocks": 1, "block_length": 1, "top_k": 1})
        if config.top_k > config.num_blocks:
            raise ValueError(
                f"top_k={config.top_k} blocks cannot be read of num_blocks={config.num_blocks}; use "
                "fewer, or keep more"
            )
        return config

    @classmethod
    def num_inserted(cls, config: LandmarkConfig, dims: Dims) -> int:
        return config.top_k * config.block_length

    def init_state(self, batch_size: int) -> LandmarkState:
        places = self.config.num_blocks * self.config.block_length
        shape = (batch_size, self.dims.num_kv_heads, places, self.dims.head_dim)
        return LandmarkState(
            self.zeros(*shape), self.zeros(*shape), self.zeros(batch_size, dtype=torch.long)
        )

    def forward(
        self,
        x: QKV,
        state: LandmarkState,
        inner: InnerHeads,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, LandmarkState]:
        # Without the scores, which would be held while blocks are read.
        local, local_lse, query = inner(x, parts=True)[:3]
        found, lse = self.read(query, state)
        y = mixed(share(lse, local_lse), found, lse, local)
        return (y, self.write(x.k, x.v, state, mask)) if write else (y, state)

    def write(
        self, k: Tensor, v: Tensor, state: LandmarkState, mask: Tensor | None
    ) -> LandmarkState:
        """Keep the keys and values (B, G, T, dh) of a segment's real tokens."""
        (keys, values), length = push_blocks(
            (state.keys, state.values), state.length, (k, v), mask, self.config.block_length
        )
        return LandmarkState(keys, values, length)

    def read(self, query: Tensor, state: LandmarkState) -> tuple[Tensor, Tensor]:
        """What each query (B, H, T, dh) reads of its blocks, (B, H, T, dh), float32 or wider.

        query: its product with a key is the score that the key would have. Also the log-sum-exp (B, H, T)
        of what the blocks weigh, the least number where none is held.
        """
        (batch, heads, length), (groups, places, size) = query.shape[:3], state.keys.shape[1:]
        block, k = self.config.block_length, self.config.top_k
        wide = accumulator_dtype(state.keys.dtype)
        with torch.autocast(query.device.type, enabled=False):
            landmarks, count = block_means(state.keys, state.length, block, wide)
            stored = Blocks(state.keys.to(wide), state.values.to(wide), state.length, block)
            # Where the store is large beside what is read of it, what is read is copied.
            copies = places > min(COPIED, heads // groups * length) * k * block
            attend = attend_to_copies if copies else attend_in_all

            def read(q: Tensor) -> tuple[Tensor, Tensor]:
                scores = (q @ landmarks.mT).masked_fill((count == 0)[:, None, None], none(q))
                near, chosen = scores.topk(k, dim=-1, sorted=False)
                return attend(q, chosen, near if self.config.grouped else None, stored)

            numbers = places // block + (2 * k * block * size if copies else 2 * places)
            rows = max(1, NUMBERS // max(1, batch * groups * numbers))
            return read_in_parts(read, [query.to(wide)], groups, rows)
