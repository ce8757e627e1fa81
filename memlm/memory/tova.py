"""TOVA: the keys and values that the last query attends to most stay (Oren et al. 2024, *Transformers are
Multi-State RNNs*).

A layer holds `memory_length` tokens before the segment, and attention sees them as it sees the segment's
own. At a segment's end the last token's attention weights, averaged over the heads, rank all of these and
the segment's tokens; the first `memory_length` stay, in the order in which they stood. Nothing is trained.

Kept keys are rotated to consecutive places in front of the segment, so that no place grows with the
document; the paper's code keeps their own places, or narrows the gaps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from memlm.memory.base import QKV, Continues, Dims, InnerHeads, Memory, MemoryConfig, Site
from memlm.memory.parts.cache import cleared, held, length_kept, pick


@dataclass(frozen=True, kw_only=True)
class TOVAConfig(MemoryConfig):
    """memory_length: tokens that stay.

    None picks a segment, or what the base model's positions leave beside one where that is less.
    """

    memory_length: int | None = None


class TOVAState(NamedTuple):
    """keys and values (B, G, N, dh), right-aligned; length (B,): how many of the N places are filled."""

    keys: Tensor
    values: Tensor
    length: Tensor


class TOVA(Memory):
    """Attention over the tokens before the segment that were attended to most."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = TOVAConfig
    neutral: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("front")
    joins_softmax: ClassVar[bool] = True

    def __init__(self, config: TOVAConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.memory_length is not None
        self.memory_length = config.memory_length

    @classmethod
    def resolve(cls, config: TOVAConfig, dims: Dims) -> TOVAConfig:
        return replace(config, memory_length=length_kept(config.memory_length, dims))

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return config.memory_length

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        return config.memory_length

    def init_state(self, batch_size: int) -> TOVAState:
        shape = (batch_size, self.dims.num_kv_heads, self.memory_length, self.dims.head_dim)
        return TOVAState(
            self.zeros(*shape), self.zeros(*shape), self.zeros(batch_size, dtype=torch.long)
        )

    def forward(
        self,
        x: QKV,
        state: TOVAState,
        inner: InnerHeads,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, TOVAState]:
        k = torch.cat([state.keys.to(x.k.dtype), x.k], dim=2)
        v = torch.cat([state.values.to(x.v.dtype), x.v], dim=2)
        present = (
            x.k.new_ones(x.k.shape[0], x.k.shape[2], dtype=torch.bool) if mask is None else mask
        )
        real = torch.cat([held(state.length, self.memory_length), present], dim=1)
        if not write:
            return inner(QKV(x.q, k, v), mask=real), state
        seen = inner(QKV(x.q, k, v), mask=real, parts=True)
        chosen, length = self.kept(seen.scores, real)
        keys, values = (cleared(pick(t, chosen), length) for t in (k, v))
        return seen.output, TOVAState(
            keys.to(state.keys.dtype), values.to(state.values.dtype), length
        )

    @torch.no_grad()
    def kept(self, scores: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the keys stay: places (B, N), those of nothing in front, and how many there are (B,).

        scores (B, H, T, N + T): as the segment's queries see the keys. real (B, N + T) bool: which are
        there, the segment's own at the end.
        """
        size, places = scores.shape[2], torch.arange(real.shape[1], device=real.device)
        last = (places * real).amax(dim=1) - (real.shape[1] - size)
        # A row of which nothing is in this segment keeps all it has, whatever is asked.
        last = last.clamp(min=0)[:, None, None, None].expand(
            -1, scores.shape[1], 1, scores.shape[3]
        )
        weights = scores.gather(2, last).squeeze(2).softmax(dim=-1).mean(dim=1)
        most = weights.masked_fill(~real, -1.0).topk(self.memory_length, dim=-1).indices
        # In the order in which they stood, behind what is not there.
        order = (places + real * real.shape[1]).gather(1, most).argsort(dim=1)
        return most.gather(1, order), real.sum(dim=1).clamp(max=self.memory_length)
