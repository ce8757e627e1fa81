"""Memory caching: a memory for each segment, and a fixed number of them kept (Behrouz et al. 2026,
*Memory Caching: RNNs with Growing Memory*).

Every segment is compressed by itself, from nothing, by the delta rule of `parts.delta_rule`. What
comes of it is cached as it is, with a summary of the segment: the mean of what stood in it. A token
asks the memory of its own segment and those cached ones whose summaries suit it best, and weighs
their answers by how well they do. Stored memories are never written again, so nothing wears them
down. The block stands beside a layer's attention, with an output projection of zeros, so that a
base model is left as it was. In the paper's other form (`continuing`) a segment is not compressed
from nothing: it goes on from the memory that the one before has left, and each slot holds the whole
document as it was known by then.

Differs from the paper, whose cache grows with the document: there are N slots, and when all are
taken, the segment in which least was written gives way, if more was written in the new one. So
segments whose write gates are shut never enter, and leave the state as it was, to the bit.

Letters: N slots, dk, dv size of keys and values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memlm.memory.base import (
    Continues,
    Dims,
    Inner,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
)
from memlm.memory.parts.checks import check_least, head_sizes
from memlm.memory.parts.delta_block import EPSILON, answered
from memlm.memory.parts.delta_kernels import run_delta_rule
from memlm.memory.parts.delta_rule import Tokens
from memlm.memory.parts.gates import GatedConfig, GatedMemory, gate_statistics
from memlm.memory.parts.starts import start_convolution, start_output
from memlm.memory.parts.tokens import (
    real_first_order,
    short_convolution,
    tokens_back_from,
    tokens_in,
)

READS = ("top-k", "gated", "residual", "soup")
SUMMARIES = ("written", "mean")


@dataclass(frozen=True, kw_only=True)
class MemoryCachingConfig(GatedConfig):
    """Options of memory caching.

    num_slots: segments that are kept; state and cost grow with it. read: "top-k" (the paper's sparse
    selective caching), the best `top_k` slots for each token, or "gated" (its gated residual memory),
    all of them, both weighed by a softmax over their scores; "residual", the sum of all, unweighed;
    "soup", the memories mixed before they are asked, for linear memories the same as "gated" but for
    rounding. summary: what a segment is scored by, the mean of its tokens as far as they were
    "written", or their plain "mean" (the paper's). continuing: whether a segment's memory goes on from
    that of the segment before, and a slot holds all that was known by then. num_heads: heads of the
    memory, None for the base's; head_dim: size of queries and keys, None for hidden size / heads;
    value_dim: size of values, None for head_dim. erases: whether a write first takes away what its key
    held (the delta rule); False is linear attention. conv_size: width of the short convolutions within
    a segment, 0 for none. chunk_length: tokens computed at once, None for 64; only rounding depends on
    it. write_gate and what goes with it: as in `GatedConfig`. initial_gate: the write gate's logit at
    the start. output_std: scale of the output projection at the start; 0 leaves the stage as it was.
    """

    num_slots: int = 64
    read: str = option("top-k")
    top_k: int = option(4)
    summary: str = "written"
    continuing: bool = False
    num_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    erases: bool = True
    conv_size: int = 4
    chunk_length: int | None = option(None)
    initial_gate: float = option(0.0)
    output_std: float = option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """The paper's best form, over a linear memory: all segments of a document of 64 at most.

        The paper's segments have 256 tokens, and its documents 16,384 at most.
        """
        return cls(read="gated", summary="mean", erases=False)

    def resolved(self, dims: Dims) -> Self:
        """Fill what is open from `dims`; ValueError for what cannot be."""
        self.check_gates()
        for name, known in (("read", READS), ("summary", SUMMARIES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(known)}"
                )
        heads, size = head_sizes(self.num_heads, self.head_dim, dims)
        filled = replace(
            self,
            num_heads=heads,
            head_dim=size,
            value_dim=size if self.value_dim is None else self.value_dim,
            chunk_length=64 if self.chunk_length is None else self.chunk_length,
        )
        least = dict.fromkeys(("head_dim", "value_dim", "chunk_length", "num_slots", "top_k"), 1)
        check_least(filled, least | {"conv_size": 0, "output_std": 0})
        if self.read == "top-k" and self.top_k > self.num_slots:
            raise ValueError(
                f"top_k={self.top_k} is more than num_slots={self.num_slots}; use at most that many, "
                "or read='gated' for all"
            )
        return filled


class MemoryCachingState(NamedTuple):
    """What is cached, float32 or wider: memory (B, H, N, dk, dv), summaries (B, N, D), mass (B, N).

    mass: the sum of a segment's write gates, mean over heads; 0 marks an empty slot. written, opened
    (B,): the mean gate and the largest over the last segment's tokens. last (B, H, dk, dv): the memory
    after the last segment, where the next goes on from it; else ().
    """

    memory: Tensor
    summaries: Tensor
    mass: Tensor
    written: Tensor
    opened: Tensor
    last: Tensor | tuple[()] = ()


class MemoryCaching(GatedMemory):
    """Cached delta-rule memories beside a layer's attention."""

    site: ClassVar[Site] = "attention"
    Config: ClassVar[type[MemoryConfig]] = MemoryCachingConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("whole")
    config: MemoryCachingConfig

    def __init__(self, config: MemoryCachingConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_heads and config.head_dim and config.value_dim and config.chunk_length
        self.heads, self.keys, self.values = config.num_heads, config.head_dim, config.value_dim
        self.chunk = config.chunk_length
        hidden, width = dims.hidden_size, self.heads * (2 * self.keys + self.values)
        self.qkv_proj = nn.Linear(hidden, width, bias=False)
        self.kernel = (
            nn.Parameter(torch.empty(width, 1, config.conv_size)) if config.conv_size else None
        )
        self.b_proj = nn.Linear(hidden, self.heads)
        # What a token looks for among the summaries; a sum of all needs none.
        self.u_proj = nn.Linear(hidden, hidden, bias=False) if config.read != "residual" else None
        self.g_proj = nn.Linear(hidden, self.heads * self.values, bias=False)
        self.o_norm = nn.Parameter(torch.empty(self.values))
        self.o_proj = nn.Linear(self.heads * self.values, hidden, bias=False)

    @classmethod
    def resolve(cls, config: MemoryCachingConfig, dims: Dims) -> MemoryCachingConfig:
        return config.resolved(dims)

    def reset_parameters(self, embedding_std: float) -> None:
        config = self.config
        for linear in (self.qkv_proj, self.b_proj, self.g_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.constant_(self.b_proj.bias, config.initial_gate)
        if self.u_proj is not None:
            # A token looks for segments in which its like stood. The paper does not say how it starts.
            nn.init.eye_(self.u_proj.weight)
        if self.kernel is not None:
            start_convolution(self.kernel)
        nn.init.ones_(self.o_norm)
        start_output(self.o_proj.weight, config.output_std)

    def init_state(self, batch_size: int) -> MemoryCachingState:
        dtype = accumulator_dtype(self.o_norm.dtype)
        slots = self.config.num_slots
        return MemoryCachingState(
            self.zeros(batch_size, self.heads, slots, self.keys, self.values, dtype=dtype),
            self.zeros(batch_size, slots, self.dims.hidden_size, dtype=dtype),
            self.zeros(batch_size, slots, dtype=dtype),
            self.zeros(batch_size, dtype=dtype),
            self.zeros(batch_size, dtype=dtype),
            self.zeros(batch_size, self.heads, self.keys, self.values, dtype=dtype)
            if self.config.continuing
            else (),
        )

    def forward(
        self,
        x: Tensor,
        state: MemoryCachingState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, MemoryCachingState]:
        answer, new = self.branch(x, state, mask, write)
        return inner(x) + answer, new

    def branch(
        self, x: Tensor, state: MemoryCachingState, mask: Tensor | None, write: bool
    ) -> tuple[Tensor, MemoryCachingState]:
        """What the memories answer to `x` (B, T, D), and the state, with this segment in it if `write`."""
        order, real = real_first_order(mask)
        x = tokens_in(order, x)
        q, k, v = self._heads(x, real, state.memory.dtype)
        gate = self.gates_of(x, state, real)
        with torch.autocast(x.device.type, enabled=False):
            tokens = Tokens(q.unsqueeze(2), k, v, gate, erases=self.config.erases)
            own, memory = run_delta_rule(tokens, self._start(state), self.chunk, x.dtype)
            means = self._running_means(x, gate, real)
            new = self._cached(state, memory, means[:, -1], gate, real) if write else state
        y = self._answer(x, q, means, own.squeeze(2), state)
        return tokens_back_from(order, y), new

    def gates_of(self, x: Tensor, state: MemoryCachingState, mask: Tensor | None) -> Tensor:
        logit = self.b_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            gate = self.gates_at(logit.to(state.memory.dtype).mT)
            return gate if mask is None else gate * mask.unsqueeze(1)

    def forward_silent(
        self, x: Tensor, state: MemoryCachingState, inner: Inner, *, mask: Tensor | None
    ) -> tuple[Tensor, MemoryCachingState]:
        order, real = real_first_order(mask)
        tokens = tokens_in(order, x)
        q, _, _ = self._heads(tokens, real, state.memory.dtype)
        with torch.autocast(x.device.type, enabled=False):
            means = self._running_means(tokens, torch.zeros_like(q[..., 0]), real)
            # A segment's own memory has its place in the softmax, even if nothing came to it.
            own = q @ self._start(state)
        y = tokens_back_from(order, self._answer(tokens, q, means, own, state))
        return inner(x) + y, self.silent_state(x, state, mask)

    def _start(self, state: MemoryCachingState) -> Tensor:
        """(B, H, dk, dv): what a segment's own memory is before its first token."""
        last = state.last
        return last if isinstance(last, Tensor) else torch.zeros_like(state.memory[:, :, 0])

    def _answer(
        self, x: Tensor, q: Tensor, means: Tensor, own: Tensor, state: MemoryCachingState
    ) -> Tensor:
        """What the slots and the segment's own memory, `own` (B, H, T, dv), say to `x` (B, T, D)."""
        wanted = x if self.u_proj is None else self.u_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            weights = self._weights(wanted.to(q.dtype), means, state)
            found = self._ask(q, state.memory, weights[..., 1:]) + weights[:, None, :, :1] * own
        return answered(found, x, self.o_norm, self.g_proj, self.o_proj)

    def _heads(
        self, x: Tensor, real: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> queries and keys (B, H, T, dk), normed, and values (B, H, T, dv), in `dtype`."""
        z = self.qkv_proj(x)
        if self.kernel is not None:
            before = z.new_zeros(len(z), self.config.conv_size - 1, z.shape[2])
            z, _ = short_convolution(z, self.kernel, before, real)
        z = rearrange(F.silu(z).to(dtype), "b t (h d) -> b h t d", h=self.heads)
        q, k, v = z.split([self.keys, self.keys, self.values], dim=-1)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v

    def _running_means(self, x: Tensor, gate: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, D) in the dtype of the gates (B, H, T): at each token, the segment's summary so far."""
        share = gate.mean(dim=1)
        if self.config.summary == "mean":
            share = torch.ones_like(share) if real is None else real.to(share.dtype)
        total = share.cumsum(dim=1).clamp(min=EPSILON)
        return (share.unsqueeze(-1) * x).cumsum(dim=1) / total.unsqueeze(-1)

    def _weights(self, wanted: Tensor, means: Tensor, state: MemoryCachingState) -> Tensor:
        """(B, T, 1 + N): how much the segment's own memory counts at each token, and each slot's."""
        empty = (state.mass == 0).unsqueeze(1)
        if self.u_proj is None:
            counts = torch.ones_like(means[..., :1])
            return torch.cat([counts, (~empty).to(counts.dtype).expand(-1, means.shape[1], -1)], -1)
        own = (wanted * means).sum(dim=-1, keepdim=True)
        cached = (wanted @ state.summaries.mT).masked_fill(empty, -math.inf)
        if self.config.read == "top-k":
            least = cached.topk(self.config.top_k, dim=-1).values[..., -1:]
            cached = cached.masked_fill(cached < least, -math.inf)
        return torch.cat([own, cached], dim=-1).softmax(dim=-1)

    def _ask(self, q: Tensor, memory: Tensor, weights: Tensor) -> Tensor:
        """The weighed answers (B, H, T, dv) of all slots to `q` (B, H, T, dk)."""
        weights = weights.unsqueeze(1)
        if self.config.read == "soup":
            mixtures = (weights @ memory.flatten(3)).unflatten(3, memory.shape[3:])
            return (q.unsqueeze(3) @ mixtures).squeeze(3)
        # Weighing the questions instead of the answers makes one product of all slots.
        joined = memory.flatten(2, 3)
        parts = zip(weights.split(self.chunk, dim=2), q.split(self.chunk, dim=2), strict=True)
        return torch.cat(
            [(w.unsqueeze(4) * x.unsqueeze(3)).flatten(3) @ joined for w, x in parts], 2
        )

    def _cached(
        self,
        state: MemoryCachingState,
        memory: Tensor,
        summary: Tensor,
        gate: Tensor,
        real: Tensor | None,
    ) -> MemoryCachingState:
        """The state with this segment in the slot of least mass, if more was written in it."""
        mass = gate.mean(dim=1).sum(dim=1, keepdim=True)  # (B, 1)
        slot = state.mass.argmin(dim=1, keepdim=True)  # the first of several
        enters = mass > state.mass.gather(1, slot)
        slots = torch.arange(state.mass.shape[1], device=mass.device)
        here = (slots == slot) & enters  # (B, N)
        return MemoryCachingState(
            torch.where(here[:, None, :, None, None], memory.unsqueeze(2), state.memory),
            torch.where(here[..., None], summary.unsqueeze(1), state.summaries),
            torch.where(here, mass, state.mass),
            *gate_statistics(gate, real),
            memory if self.config.continuing else (),
        )
