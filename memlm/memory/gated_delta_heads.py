"""Gated delta rules on a layer's own queries, keys and values: a linear memory at its softmax.

The rules of `gated-delta` (Yang et al. 2024, *Gated Delta Networks*) without a projection of their
own: each key-value head has a state, its queries ask it, and what it answers is added to the
softmax's output by a gate per head that starts at zero. Gates are linear in the key. So a memory of
this kind has hardly any parameters, and a base model is left as it was at the start. Converting a
model's attention like this is Liger's recipe (Lan et al. 2025), whose gates are pooled keys.

Queries and keys come without positions, and are normed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.memory.base import (
    QKV,
    Continues,
    Dims,
    InnerHeads,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
    was_loaded,
)
from memlm.memory.parts.delta_kernels import run_delta_rule
from memlm.memory.parts.delta_rule import Tokens
from memlm.memory.parts.gates import GatedConfig, GatedMemory, gate_statistics


@dataclass(frozen=True, kw_only=True)
class GatedDeltaHeadsConfig(GatedConfig):
    """Options of the gated delta rule at the softmax.

    erases: whether a write first takes away what its key held (the delta rule). decays: whether
    what is held fades, by a gate per head and token. chunk_length: tokens computed at once, None
    for 64; only rounding depends on it. write_gate and what goes with it: as in `GatedConfig`.
    initial_gate: the write gate's logit at the start. initial_decay: share of the state that a
    token lets fade at the start.
    initial_mix: how much of what is answered is added at the start; 0 leaves the base as it was.
    """

    erases: bool = True
    decays: bool = True
    chunk_length: int | None = option(None)
    initial_gate: float = option(0.0)
    initial_decay: float = option(0.001)
    initial_mix: float = option(0.0)


class GatedDeltaHeadsState(NamedTuple):
    """memory (B, G, dh, dh), float32 or wider; written, opened (B,): the mean gate and the largest of
    the last segment's tokens."""

    memory: Tensor
    written: Tensor
    opened: Tensor


class GatedDeltaHeads(GatedMemory):
    """Gated delta rules at the softmax."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = GatedDeltaHeadsConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("write")
    config: GatedDeltaHeadsConfig

    def __init__(self, config: GatedDeltaHeadsConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        groups, size = dims.num_kv_heads, dims.head_dim
        # Per key-value head: the write gate, and what fades, from the key.
        self.gates = nn.Parameter(torch.empty(2 if config.decays else 1, groups, size))
        self.biases = nn.Parameter(torch.empty(2 if config.decays else 1, groups))
        self.mix = nn.Parameter(torch.empty(dims.num_heads))

    @classmethod
    def resolve(cls, config: GatedDeltaHeadsConfig, dims: Dims) -> GatedDeltaHeadsConfig:
        config.check_gates()
        chunk = 64 if config.chunk_length is None else config.chunk_length
        if chunk < 1:
            raise ValueError(f"chunk_length={chunk} must be at least 1")
        if not 0 < config.initial_decay < 1:
            raise ValueError(f"initial_decay={config.initial_decay} must lie between 0 and 1")
        return replace(config, chunk_length=chunk)

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.normal_(self.gates, std=0.1 * self.dims.head_dim**-0.5)
        decay = torch.logit(torch.tensor(self.config.initial_decay))
        starts = torch.tensor([self.config.initial_gate, float(decay)])[: len(self.biases)]
        nn.init.constant_(self.mix, self.config.initial_mix)
        if not was_loaded(self.biases):
            with torch.no_grad():
                self.biases.copy_(starts[:, None].expand_as(self.biases))

    def init_state(self, batch_size: int) -> GatedDeltaHeadsState:
        groups, size = self.dims.num_kv_heads, self.dims.head_dim
        dtype = accumulator_dtype(self.mix.dtype)
        return GatedDeltaHeadsState(
            self.zeros(batch_size, groups, size, size, dtype=dtype),
            self.zeros(batch_size, dtype=dtype),
            self.zeros(batch_size, dtype=dtype),
        )

    def forward(
        self,
        x: QKV,
        state: GatedDeltaHeadsState,
        inner: InnerHeads,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, GatedDeltaHeadsState]:
        local = inner(x)
        with torch.autocast(x.k.device.type, enabled=False):
            found, new = self.recall(x, state, mask)
        return self._mixed(local, found), (new if write else state)

    def gates_of(self, x: QKV, state: GatedDeltaHeadsState, mask: Tensor | None) -> Tensor:
        with torch.autocast(x.k.device.type, enabled=False):
            return self._gate(self._logits(x.k.to(state.memory.dtype))[0], mask)

    def forward_silent(
        self, x: QKV, state: GatedDeltaHeadsState, inner: InnerHeads, *, mask: Tensor | None
    ) -> tuple[Tensor, GatedDeltaHeadsState]:
        local = inner(x)
        with torch.autocast(x.k.device.type, enabled=False):
            found = (self._queries(x.q.to(state.memory.dtype)) @ state.memory.unsqueeze(2)).flatten(
                1, 2
            )
        return self._mixed(local, found), self.silent_state(x, state, mask)

    def _mixed(self, local: Tensor, found: Tensor) -> Tensor:
        """The softmax's output (B, H, T, dh), and of what was found as much as each head's mix says."""
        with torch.autocast(local.device.type, enabled=False):
            return local + (self.mix.to(found.dtype)[:, None, None] * found).to(local.dtype)

    def _queries(self, q: Tensor) -> Tensor:
        """(B, H, T, dh) -> (B, G, H / G, T, dh), normed."""
        return F.normalize(q, dim=-1).unflatten(1, (self.dims.num_kv_heads, -1))

    def _logits(self, k: Tensor) -> Tensor:
        """Of the write gate and, if the memory decays, of the decay: (n, B, G, T)."""
        logits = torch.einsum("bgtd,ngd->nbgt", k, self.gates.to(k.dtype))
        return logits + self.biases.to(k.dtype)[:, None, :, None]

    def _gate(self, logit: Tensor, mask: Tensor | None) -> Tensor:
        gate = self.gates_at(logit)
        return gate if mask is None else gate * mask.unsqueeze(1)

    def recall(
        self, x: QKV, state: GatedDeltaHeadsState, mask: Tensor | None
    ) -> tuple[Tensor, GatedDeltaHeadsState]:
        """What the memory answers to the queries (B, H, T, dh), and the state after the keys."""
        wide = state.memory.dtype
        k = x.k.to(wide)
        logits = self._logits(k)
        gate = self._gate(logits[0], mask)
        log_decay = None
        if self.config.decays:
            log_decay = F.logsigmoid(-logits[1])
            if self.config.write_gate == "hard":
                log_decay = log_decay * gate
            elif self.threshold or mask is not None:
                log_decay = torch.where(gate == 0, 0.0, log_decay)
        k = F.normalize(k, dim=-1)
        q = self._queries(x.q.to(wide))
        tokens = Tokens(q, k, x.v.to(wide), gate, log_decay, self.config.erases)
        assert self.config.chunk_length is not None
        chunk = self.config.chunk_length
        found, memory = run_delta_rule(tokens, state.memory, chunk, x.v.dtype)
        return found.flatten(1, 2), GatedDeltaHeadsState(memory, *gate_statistics(gate, mask))
