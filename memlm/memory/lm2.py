"""LM2: gated slots in every layer (Kang et al. 2025, *LM2: Large Memory Models*), in a causal form of ours.

Tokens ask a layer's slots by cross-attention and add the answer through an output gate. When the segment is
over, the slots ask its tokens, and take the answer in through an input and a forget gate.

This is no reproduction. The published code updates the memory before the tokens of the same segment read
it, so that a token is told of later ones; it threads one memory through all layers and never resets it.
Here a segment reads what the segments before it left, and every layer has a memory of its own
(docs/methods/lm2.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from memlm.memory.base import (
    Continues,
    Dims,
    Inner,
    Memory,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
)
from memlm.memory.parts.checks import head_sizes
from memlm.memory.parts.slots import CrossAttention

MOST_SLOTS = 64  # picked by default


@dataclass(frozen=True, kw_only=True)
class LM2Config(MemoryConfig):
    """Options of LM2.

    num_slots: vectors in each layer's memory; None picks 64, or the hidden size where that is less.
    num_heads, head_dim: of the two attentions; None picks the base's heads, and hidden size / num_heads.
    input_bias, forget_bias: logits of the two gates at the start, 0 and 1 in the published code; with a
    forget_bias of b a slot keeps sigmoid(b) of itself per segment, 0.73 with 1, 0.997 with 6.
    output_std: scale of the reading attention's output projection at the start; 0 leaves the base model's
    logits as they were, and models trained from scratch want about 0.1.
    """

    num_slots: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    input_bias: float = option(0.0)
    forget_bias: float = option(1.0)
    output_std: float = option(0.0)


class LM2State(NamedTuple):
    """slots (B, N, D), float32 or wider."""

    slots: Tensor


class LM2(Memory):
    """Gated memory slots in every layer."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = LM2Config
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("read")
    config: LM2Config

    def __init__(self, config: LM2Config, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_slots is not None
        size = dims.hidden_size
        heads = head_sizes(config.num_heads, config.head_dim, dims)
        self.initial_slots = nn.Parameter(torch.empty(config.num_slots, size))
        self.token_norm, self.written_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.reading, self.writing = CrossAttention(size, *heads), CrossAttention(size, *heads)
        self.output_gate = nn.Linear(size, size)
        self.token_scale = nn.Parameter(torch.empty(size))
        # The published gates: a part from the segment's tokens, the same for all slots, and one per slot.
        self.tokens_in, self.tokens_kept = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.slots_in, self.slots_kept = nn.Linear(size, size), nn.Linear(size, size)

    @classmethod
    def resolve(cls, config: LM2Config, dims: Dims) -> LM2Config:
        head_sizes(config.num_heads, config.head_dim, dims)
        slots = min(MOST_SLOTS, dims.hidden_size) if config.num_slots is None else config.num_slots
        if not 1 <= slots <= dims.hidden_size:
            raise ValueError(
                f"num_slots={slots} must be from 1 to hidden_size={dims.hidden_size}, since slots start "
                "as different rows of the identity; use fewer slots"
            )
        return replace(config, num_slots=slots)

    def reset_parameters(self, embedding_std: float) -> None:
        unit = self.dims.hidden_size**-0.5
        nn.init.eye_(self.initial_slots)
        nn.init.ones_(self.token_scale)
        for norm in (self.token_norm, self.written_norm):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        self.reading.reset_parameters(self.config.output_std)
        self.writing.reset_parameters(self.writing.output.in_features**-0.5)
        gates = (self.output_gate, self.tokens_in, self.tokens_kept, self.slots_in, self.slots_kept)
        for gate in gates:
            nn.init.normal_(gate.weight, std=unit)
        nn.init.zeros_(self.output_gate.bias)
        nn.init.constant_(self.slots_in.bias, self.config.input_bias)
        nn.init.constant_(self.slots_kept.bias, self.config.forget_bias)

    def init_state(self, batch_size: int) -> LM2State:
        slots = self.initial_slots.to(accumulator_dtype(self.initial_slots.dtype))
        return LM2State(slots.expand(batch_size, -1, -1))

    def forward(
        self, x: Tensor, state: LM2State, inner: Inner, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, LM2State]:
        y = inner(x) + self.read(x, state)
        return y, (self.write(y, state, mask) if write else state)

    def read(self, x: Tensor, state: LM2State) -> Tensor:
        """sigmoid(W e + b) e (B, T, D), where e is what the tokens x (B, T, D) find in the slots."""
        tokens = x.to(self.initial_slots.dtype)
        slots = state.slots.to(tokens.dtype)
        found = self.reading(self.token_norm(tokens), slots)
        return (torch.sigmoid(self.output_gate(found)) * found).to(x.dtype)

    def write(self, y: Tensor, state: LM2State, mask: Tensor | None) -> LM2State:
        """The slots after a segment whose layer gave y (B, T, D), real where mask (B, T) is True."""
        old = state.slots
        tokens = self.written_norm(y.to(self.initial_slots.dtype))
        slots = old.to(tokens.dtype)
        new = torch.tanh(self.writing(slots, tokens, mask).to(old.dtype))
        pooled = mean_of_real(torch.relu(self.token_scale * tokens), mask).unsqueeze(1)
        bounded = torch.tanh(slots)
        taken = torch.sigmoid((self.tokens_in(pooled) + self.slots_in(bounded)).to(old.dtype))
        kept = torch.sigmoid((self.tokens_kept(pooled) + self.slots_kept(bounded)).to(old.dtype))
        return LM2State(taken * new + kept * old)


def mean_of_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, D): the mean of the tokens that are real; zero where none is."""
    if mask is None:
        return x.mean(dim=1)
    total = x.masked_fill(~mask.unsqueeze(-1), 0).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1).to(x.dtype)
