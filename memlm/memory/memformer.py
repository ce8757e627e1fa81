"""Memformer: slots that tokens ask in every layer, and that ask the tokens back (Wu et al. 2022).

*Memformer: A Memory-Augmented Transformer for Sequence Modeling*. Tokens read a layer's slots by
cross-attention. When the segment is over, every slot attends to itself and to the segment's tokens, sharply
(temperature), with its own value as it is; so a slot that finds nothing stays what it was. Then a learned
bias is added and the slot brought back to its length, by which it slowly forgets.

There one set of slots is read by all layers and written from the last. Here each layer has slots of its
own, read and written there: no state of the last layer then holds up the next segment's first. Training
that replays segments in the backward pass (the paper's memory replay) is not a matter of the mechanism
here: `model.gradient_checkpointing_enable()` does it for all memories (docs/methods/memformer.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
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
from memlm.memory.parts.checks import check_least, head_sizes
from memlm.memory.parts.slots import CrossAttention, in_heads, out_of_heads, scores_of


@dataclass(frozen=True, kw_only=True)
class MemformerConfig(MemoryConfig):
    """Options of Memformer.

    num_slots: vectors in each layer's memory. num_heads: of both attentions, a divisor of the hidden size;
    None picks the base's. temperature: what the logits of writing are divided by; below 1 a slot takes from
    few tokens, or from itself alone. bias_std: scale of the bias that is added to a slot of scale 1 at each
    segment, at the start; with 0.1 a slot that takes nothing in has a cosine of 0.7 with what it was after
    ten segments.
    output_std: scale of the reading attention's output projection at the start; 0 leaves the base model's
    logits as they were, and models trained from scratch want about 0.1.
    """

    num_slots: int = 16
    num_heads: int | None = None
    temperature: float = 0.25
    bias_std: float = option(0.1)
    output_std: float = option(0.0)


class MemformerState(NamedTuple):
    """slots (B, N, D), each of length sqrt(D); float32 or wider."""

    slots: Tensor


class Memformer(Memory):
    """Slots that attend to themselves and to the segment."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = MemformerConfig
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("read")
    config: MemformerConfig

    def __init__(self, config: MemformerConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        size = dims.hidden_size
        self.heads, head_dim = head_sizes(config.num_heads, None, dims)
        self.temperature = config.temperature
        self.bias = nn.Parameter(torch.empty(config.num_slots, size))
        self.token_norm, self.written_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.reading = CrossAttention(size, self.heads, head_dim)
        self.query, self.key, self.value = (nn.Linear(size, size, bias=False) for _ in range(3))

    @classmethod
    def resolve(cls, config: MemformerConfig, dims: Dims) -> MemformerConfig:
        check_least(config, {"num_slots": 1})
        heads, _ = head_sizes(config.num_heads, None, dims)
        for name in ("temperature", "bias_std"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{name}={getattr(config, name)} must be above 0")
        return replace(config, num_heads=heads)

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.normal_(self.bias, std=self.config.bias_std)
        for norm in (self.token_norm, self.written_norm):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        self.reading.reset_parameters(self.config.output_std)
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=self.dims.hidden_size**-0.5)

    def init_state(self, batch_size: int) -> MemformerState:
        bias = self.bias.to(accumulator_dtype(self.bias.dtype))
        return MemformerState(self.normalised(bias).expand(batch_size, -1, -1))

    def forward(
        self,
        x: Tensor,
        state: MemformerState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, MemformerState]:
        y = inner(x + self.read(x, state))
        return y, (self.write(y, state, mask) if write else state)

    def read(self, x: Tensor, state: MemformerState) -> Tensor:
        """What the tokens x (B, T, D) find in the slots: (B, T, D)."""
        tokens = x.to(self.bias.dtype)
        found = self.reading(self.token_norm(tokens), state.slots.to(tokens.dtype))
        return found.to(x.dtype)

    def write(self, y: Tensor, state: MemformerState, mask: Tensor | None) -> MemformerState:
        """The slots after a segment whose layer gave y (B, T, D), real where mask (B, T) is True."""
        old = state.slots
        tokens = self.written_norm(y.to(self.bias.dtype))
        slots = old.to(tokens.dtype)
        query, own, key = (
            in_heads(z, self.heads) for z in (self.query(slots), self.key(slots), self.key(tokens))
        )
        to_itself = (query * own).sum(dim=-1, keepdim=True) * query.shape[-1] ** -0.5
        # A slot attends to itself and not to other slots, which would make all of them alike.
        scores = torch.cat([to_itself, scores_of(query, key, mask)], dim=-1)
        weights = (scores.to(old.dtype) / self.temperature).softmax(dim=-1)
        found = weights[..., 1:].to(tokens.dtype) @ in_heads(self.value(tokens), self.heads)
        kept = weights[..., :1] * in_heads(old, self.heads)
        new = out_of_heads(kept + found.to(old.dtype)) + self.bias.to(old.dtype)
        return MemformerState(self.normalised(new))

    def normalised(self, slots: Tensor) -> Tensor:
        """`slots` (..., D) brought to length sqrt(D), the scale of normed tokens."""
        return F.normalize(slots, dim=-1) * self.dims.hidden_size**0.5
