"""Infini-attention: a linear attention over all past segments beside the softmax one (Munkhdalai 2024).

The layer's own queries, keys and values, without positions, under the feature map elu + 1. A segment reads
what the segments before it left, mixed in by a learned gate per head, and is written afterwards.

Two departures from the paper (sections 2.1.1 to 2.1.3). The sums M and z are kept divided by one plus the
number of tokens in them: what is read is their quotient, which stays the same, while the sums themselves
would grow for ever. And a memory that holds nothing is not mixed in: by the formula it would scale down
the attention of a document's first segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor, nn

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
from memlm.memory.parts.feature_maps import elu_plus_one

UPDATES = ("delta", "linear")


@dataclass(frozen=True, kw_only=True)
class InfiniConfig(MemoryConfig):
    """Options of Infini-attention.

    update: "delta" stores what the memory does not say yet (equation 5), "linear" adds (equation 4).
    initial_gate: the gate's logit at the start; at 0 memory and attention weigh the same.
    """

    update: str = "delta"
    initial_gate: float = option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """The delta update, the better one there, and the default; where the gate starts is not known."""
        return cls(update="delta")


class InfiniState(NamedTuple):
    """What a layer remembers, float32 or wider, for each of G key-value heads.

    associations (B, G, dh, dh) and normaliser (B, G, dh): the paper's M and z times share (B,), which is
    1 / (1 + tokens written).
    """

    associations: Tensor
    normaliser: Tensor
    share: Tensor


class Infini(Memory):
    """Infini-attention."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = InfiniConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("read")

    def __init__(self, config: InfiniConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.delta = config.update == "delta"
        self.initial_gate = config.initial_gate
        self.gate = nn.Parameter(torch.empty(dims.num_heads))

    @classmethod
    def resolve(cls, config: InfiniConfig, dims: Dims) -> InfiniConfig:
        if config.update not in UPDATES:
            raise ValueError(f"update={config.update!r} is unknown; use {' or '.join(UPDATES)}")
        return config

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.constant_(self.gate, self.initial_gate)

    def init_state(self, batch_size: int) -> InfiniState:
        groups, size = self.dims.num_kv_heads, self.dims.head_dim
        dtype = accumulator_dtype(self.gate.dtype)
        return InfiniState(
            self.zeros(batch_size, groups, size, size, dtype=dtype),
            self.zeros(batch_size, groups, size, dtype=dtype),
            self.zeros(batch_size, dtype=dtype) + 1,
        )

    def forward(
        self,
        x: QKV,
        state: InfiniState,
        inner: InnerHeads,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, InfiniState]:
        local = inner(x)
        gate = rearrange(torch.sigmoid(self.gate), "H -> H 1 1").to(local.dtype)
        mixed = gate * self.read(x.q, state).to(local.dtype) + (1 - gate) * local
        holds = rearrange(state.share < 1, "B -> B 1 1 1")
        y = torch.where(holds, mixed, local)
        return (y, self.write(x.k, x.v, state, mask)) if write else (y, state)

    def read(self, q: Tensor, state: InfiniState) -> Tensor:
        """sigma(q) M / (sigma(q) z): (B, H, T, dh) -> (B, H, T, dh), wide; 0 where nothing is held."""
        # The h heads that share a group's keys read what the group holds.
        h = self.dims.num_heads // self.dims.num_kv_heads
        grouped = rearrange(q, "B (G h) T dh -> B G (h T) dh", h=h)
        found = recall(self._features(grouped, state), state)
        return rearrange(found, "B G (h T) dh -> B (G h) T dh", h=h)

    def write(self, k: Tensor, v: Tensor, state: InfiniState, mask: Tensor | None) -> InfiniState:
        """Add the keys and values (B, G, T, dh) of a segment's real tokens."""
        phi = self._features(k, state)
        value = v.to(phi.dtype)
        if mask is not None:
            phi = phi * rearrange(mask, "B T -> B 1 T 1")
        with torch.autocast(k.device.type, enabled=False):
            if self.delta:
                value = value - recall(phi, state)
            share = state.share
            count = k.shape[2] if mask is None else mask.sum(dim=1)
            growth = 1 + share * count
            new_share = share / growth
            old, new = (rearrange(x, "B -> B 1 1") for x in (1 / growth, new_share))
            return InfiniState(
                old[..., None] * state.associations + new[..., None] * (phi.mT @ value),
                old * state.normaliser + new * phi.sum(dim=2),
                new_share,
            )

    def _features(self, x: Tensor, state: InfiniState) -> Tensor:
        return elu_plus_one(x.to(state.normaliser.dtype))


def recall(phi: Tensor, state: InfiniState) -> Tensor:
    """Normalised read-out of features (B, G, n, dh) >= 0; 0 where nothing is held."""
    with torch.autocast(phi.device.type, enabled=False):
        counted = phi @ state.normaliser.unsqueeze(-1)
        return (phi @ state.associations) / counted.clamp(min=1e-12)
