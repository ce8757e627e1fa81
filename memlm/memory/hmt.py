"""HMT: each segment recalls one past memory vector by a summary of its beginning (He et al. 2024).

*HMT: Hierarchical Memory Transformer for Long Context Language Processing*. The decoder runs twice per
segment. First over the segment's beginning, with a learned probe behind it, whose last hidden state is the
summary. It asks a queue of the memory vectors of past segments by one head of attention; what it finds, p,
is a mean of these vectors. Then over [p; last tokens before the segment; segment; p], and the last hidden
state of the trailing p is this segment's memory vector, which joins the queue.

In the published code every token reads p, those as well that p was asked for with, and so is told of later
tokens. Here the tokens of the beginning leave with what the first run made of them, and the others read p.
So that the beginning is not without a memory, the first run starts with the queue's newest vector, where
theirs starts with the probe, and sees the last tokens of the segment before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from memlm.memory.base import Continues, Dims, Inner, Memory, MemoryConfig, Site
from memlm.memory.parts.cache import held, push
from memlm.memory.parts.memory_tokens import around, check_decoder_memory
from memlm.memory.parts.slots import scores_of

SENSORY = 32  # tokens of the segment before, as published


@dataclass(frozen=True, kw_only=True)
class HMTConfig(MemoryConfig):
    """Options of HMT.

    queue_size: memory vectors of past segments that can be recalled, the last ones (N). num_sensory_tokens:
    tokens before the segment that are read with it (k); None picks 32, or half a segment where that is
    less; 0 for none. summary_length: how many of a segment's first tokens the summary is made of, and
    cannot read what it recalls (h); None picks half a segment, as published. recall_size: width of query
    and keys; None picks the hidden size.
    """

    queue_size: int = 100
    num_sensory_tokens: int | None = None
    summary_length: int | None = None
    recall_size: int | None = None

    @classmethod
    def paper(cls) -> Self:
        """100 vectors, half a segment for the summary, 32 tokens before it (segments of 1,022)."""
        return cls(queue_size=100)


class HMTState(NamedTuple):
    """What a row remembers; both buffers are right-aligned, oldest first.

    queue (B, N, D): memory vectors; length (B,): how many. sensory (B, k, E): embeddings of the last
    tokens, the probe in the place of those that are not there yet.
    """

    queue: Tensor
    length: Tensor
    sensory: Tensor


class HMT(Memory):
    """Hierarchical Memory Transformer."""

    site: ClassVar[Site] = "model"
    Config: ClassVar[type[MemoryConfig]] = HMTConfig
    accumulates: ClassVar[bool] = False
    repeats_inner: ClassVar[bool] = True
    continues = Continues(
        "again", reason="what the segment's first tokens recall is read by the rest"
    )

    def __init__(self, config: HMTConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_sensory_tokens is not None and config.summary_length is not None
        assert config.recall_size is not None
        self.queue_size, self.num_sensory = config.queue_size, config.num_sensory_tokens
        self.summary_length = config.summary_length
        self.probe = nn.Parameter(torch.empty(1, dims.hidden_size))
        self.query, self.key = (
            nn.Linear(dims.hidden_size, config.recall_size, bias=False) for _ in range(2)
        )

    @classmethod
    def resolve(cls, config: HMTConfig, dims: Dims) -> HMTConfig:
        check_decoder_memory("hmt", config, dims)
        half = max(1, dims.segment_length // 2)
        sensory, summary = config.num_sensory_tokens, config.summary_length
        sensory = min(SENSORY, half) if sensory is None else sensory
        summary = half if summary is None else summary
        size = dims.hidden_size if config.recall_size is None else config.recall_size
        for name, value in (("queue_size", config.queue_size), ("recall_size", size)):
            if value < 1:
                raise ValueError(f"{name}={value} recalls nothing; give at least 1")
        if sensory < 0:
            raise ValueError(f"num_sensory_tokens={sensory} must be 0 or more")
        if not 1 <= summary < max(2, dims.segment_length):
            raise ValueError(
                f"summary_length={summary} must be from 1 to below segment_length={dims.segment_length}, "
                "since only the tokens after it read what is recalled"
            )
        return replace(config, num_sensory_tokens=sensory, summary_length=summary, recall_size=size)

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return config.num_sensory_tokens + 2

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.normal_(self.probe, std=embedding_std)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=self.dims.hidden_size**-0.5)

    def init_state(self, batch_size: int) -> HMTState:
        return HMTState(
            self.zeros(batch_size, self.queue_size, self.dims.hidden_size),
            self.zeros(batch_size, dtype=torch.long),
            # Nothing is masked: a mask in every segment would make the host wait for an accelerator.
            self.rows_of(self.probe.expand(self.num_sensory, -1), batch_size),
        )

    def forward(
        self, x: Tensor, state: HMTState, inner: Inner, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, HMTState]:
        h = self.summary_length
        probe = self.probe.to(x.dtype).expand(len(x), 1, -1)
        early = None if mask is None else mask & (mask.cumsum(dim=1) <= h)
        beginning = x[:, :h] if early is None else x
        sensory = state.sensory.to(x.dtype)
        front = torch.cat([self.or_probe(state.queue[:, -1:].to(x.dtype), state), sensory], dim=1)
        first, summary = around(front, beginning, probe, inner, early)
        if not write and x.shape[1] <= h:
            return first, state
        recalled = self.or_probe(self.read(summary, state).to(x.dtype), state)
        front = torch.cat([recalled, sensory], dim=1)
        y, memory = around(front, x, recalled if write else None, inner, mask)
        if early is None:
            y = torch.cat([first, y[:, h:]], dim=1)
        else:
            y = torch.where(early.unsqueeze(-1), first, y)
        return y, (self.write(x, mask, memory, state) if write else state)

    def or_probe(self, vector: Tensor, state: HMTState) -> Tensor:
        """`vector` (B, 1, D), or the learned probe where a row has no past yet."""
        empty = (state.length == 0)[:, None, None]
        return torch.where(empty, self.probe.to(vector.dtype), vector)

    def read(self, summary: Tensor, state: HMTState) -> Tensor:
        """What the summary (B, 1, D) recalls: a mean of the queue's vectors, not projected, (B, 1, D)."""
        dtype = self.query.weight.dtype
        past = state.queue.to(dtype)
        query, keys = self.query(summary.to(dtype)), self.key(past)
        seen = held(state.length, self.queue_size)
        weights = scores_of(query.unsqueeze(1), keys.unsqueeze(1), seen).softmax(dim=-1)
        return weights.squeeze(1).to(past.dtype) @ past

    def write(self, x: Tensor, mask: Tensor | None, memory: Tensor, state: HMTState) -> HMTState:
        """The state after a segment x (B, T, E) that left `memory` (B, 1, D)."""
        queue, length = pushed(state.queue, state.length, memory, None)
        sensory = state.sensory
        if self.num_sensory:
            full = torch.full_like(length, self.num_sensory)
            sensory, _ = pushed(sensory, full, x, mask)
        return HMTState(queue, length, sensory)


def pushed(
    buffer: Tensor, length: Tensor, new: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`push` for one buffer (B, N, D) and new (B, T, D)."""
    (kept,), total = push((buffer.unsqueeze(1),), length, (new.unsqueeze(1),), mask)
    return kept.squeeze(1), total
