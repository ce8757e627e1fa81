"""Mixture-of-Memories: a token writes to a few of several linear memories (Du et al. 2025, *MoM: Linear
Sequence Modeling with Mixture-of-Memories*).

A router picks `num_active` of `num_memories` for each token. Only these are written by it, by the
recurrence of `parts.delta_rule`, so that each memory sees a text of its own: the tokens that were sent to
it. All are asked by the same query, and what they answer is mixed by the router's weights; a shared
memory, which every token writes to, is added. The block around them is that of `gated-delta`, as is its
place, beside a layer's attention with an output projection of zeros.

Every memory's recurrence runs over all tokens here, those that were sent elsewhere with a step and a decay
of zero: that is exact, whatever the router does, and costs as if all were active. Short convolutions run
over the text before it is shared out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memlm.memory.base import Dims, MemoryConfig, accumulator_dtype, live_option, option
from memlm.memory.parts.checks import check_least
from memlm.memory.parts.delta_block import DeltaBlock, filled
from memlm.memory.parts.delta_kernels import run_delta_rule
from memlm.memory.parts.delta_rule import Tokens
from memlm.memory.parts.gates import GatedConfig, gate_statistics
from memlm.memory.parts.tokens import real_first_order, tokens_back_from, tokens_in


@dataclass(frozen=True, kw_only=True)
class MoMConfig(GatedConfig):
    """Options of the mixture of memories.

    num_memories, num_active: memories, and how many of them a token is sent to. shared_memory: whether
    there is one more that every token is sent to. own_projections: keys, values, gates and decays of each
    memory's own; without, all memories are given the same. balance_cost: price of sending tokens to some
    memories more than to others. rule: as in `gated-delta`. num_heads: heads of each memory, None for the
    base's; head_dim: size of queries and keys, None for hidden size / heads; value_dim: size of values,
    None for head_dim. conv_size: width of the short convolutions, 0 for none. chunk_length: tokens
    computed at once, None for 64. initial_gate: the write gates' logit at the start. conv_std, output_std:
    scales of the convolutions' taps and of the output projection at the start; 0 starts as if they were
    not there.
    """

    num_memories: int = 4
    num_active: int = 2
    shared_memory: bool = True
    own_projections: bool = True
    balance_cost: float = live_option(0.01)
    rule: str = "gated-delta"
    num_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    conv_size: int = 4
    chunk_length: int | None = option(None)
    initial_gate: float = option(0.0)
    conv_std: float = option(0.0)
    output_std: float = option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """The published configuration (hidden size 1024, 24 layers): 4 heads of 256, and the defaults.

        The convolutions' taps are the published code's, uniform to 1/2 either way.
        """
        return cls(num_heads=4, head_dim=256, conv_std=12**-0.5)

    def resolved(self, dims: Dims) -> Self:
        """Fill what is open from `dims`; ValueError for what cannot be."""
        full = filled(self, dims)
        check_least(full, {"num_memories": 1, "num_active": 1, "balance_cost": 0})
        if self.num_active > self.num_memories:
            raise ValueError(
                f"num_active={self.num_active} memories cannot be picked from "
                f"num_memories={self.num_memories}; use fewer active or more memories"
            )
        if self.num_active == 1 < self.num_memories:
            raise ValueError(
                f"num_active=1 of num_memories={self.num_memories} teaches the router nothing, as the "
                "weight of a single memory is always 1; use 2 or more"
            )
        return full


class MoMState(NamedTuple):
    """memory (B, M, H, dk, dv), float32 or wider, of M memories, the shared one last. tails: the last
    conv_size - 1 inputs of the convolutions. Of the last segment's tokens alone: written, opened (B,), the
    mean gate over the memories they were sent to, and the largest; load, chance (B, n), the share of tokens
    that each memory but the shared one got, and the router's mean probability of it."""

    memory: Tensor
    tails: tuple[Tensor, ...]
    written: Tensor
    opened: Tensor
    load: Tensor
    chance: Tensor


class Routes(NamedTuple):
    """Where tokens are sent. sent (B, M, T) bool; weights (B, M, T) of the memories' answers; load and
    chance: as in the state."""

    sent: Tensor
    weights: Tensor
    load: Tensor
    chance: Tensor


class MoM(DeltaBlock):
    """Several delta-rule memories beside a layer's attention, of which each token is sent to a few."""

    Config: ClassVar[type[MemoryConfig]] = MoMConfig
    transient: ClassVar[frozenset[str]] = DeltaBlock.transient | {"load", "chance"}
    config: MoMConfig

    def __init__(self, config: MoMConfig, dims: Dims) -> None:
        assert config.head_dim is not None
        self.memories = config.num_memories + config.shared_memory
        self.own = self.memories if config.own_projections else 1
        super().__init__(
            config,
            dims,
            sets=self.own,
            keys=config.head_dim,
            decays=self.own,
            # As the memories share the rates of decay.
            shared_kernels=True,
        )
        self.router = nn.Linear(dims.hidden_size, config.num_memories, bias=False)

    @classmethod
    def resolve(cls, config: MoMConfig, dims: Dims) -> MoMConfig:
        return config.resolved(dims)

    def reset_parameters(self, embedding_std: float) -> None:
        super().reset_parameters(embedding_std)
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5)

    def init_state(self, batch_size: int) -> MoMState:
        return MoMState(
            self.empty(batch_size, self.memories, self.heads, self.keys, self.values),
            self.empty_tails(batch_size),
            self.empty(batch_size),
            self.empty(batch_size),
            self.empty(batch_size, self.config.num_memories),
            self.empty(batch_size, self.config.num_memories),
        )

    def branch(self, x: Tensor, state: MoMState, mask: Tensor | None) -> tuple[Tensor, MoMState]:
        order, real = real_first_order(mask)
        x = tokens_in(order, x)
        parts, tails = self.streams(x, state, real)
        logits, routes = self.logits(x), self.routes(x, real)
        with torch.autocast(x.device.type, enabled=False):
            tokens, gate = self._tokens(*parts, *logits, state.memory.dtype, routes)
            found, memory = run_delta_rule(tokens, state.memory.flatten(1, 2), self.chunk, x.dtype)
            found, memory = (t.unflatten(1, (-1, self.heads)) for t in (found[:, :, 0], memory))
            found = _mixed(found, routes)
            sent_to = self.config.num_active + self.config.shared_memory
            written, _ = gate_statistics(gate.sum(dim=1) / sent_to, real)
            _, opened = gate_statistics(gate.amax(dim=1), real)
        return tokens_back_from(order, self.answer(found, x)), MoMState(
            memory, tails, written, opened, routes.load, routes.chance
        )

    def routes(self, x: Tensor, real: Tensor | None) -> Routes:
        """Where the tokens `x` (B, T, D) are sent; those that are not `real` (B, T), nowhere."""
        active, wide = self.config.num_active, accumulator_dtype(self.o_norm.dtype)
        with torch.autocast(x.device.type, enabled=False):
            # In bfloat16 two memories could come to a tie. By logits, as probabilities may be zero.
            logits = F.linear(x.to(wide), self.router.weight.to(wide))
            best, index = logits.topk(active, dim=-1)
            none, chance = torch.zeros_like(logits), logits.softmax(dim=-1)
            weights = none.scatter(-1, index, best.softmax(dim=-1))
            sent = none.scatter(-1, index, 1.0)
            if real is not None:
                sent, chance = (t * real.unsqueeze(-1) for t in (sent, chance))
            count = x.shape[1] if real is None else real.sum(dim=1, keepdim=True).clamp(min=1)
            load, chance = sent.sum(dim=1) / (active * count), chance.sum(dim=1) / count
            if self.config.shared_memory:
                everyone = torch.ones_like(sent[..., :1])
                weights = torch.cat([weights, everyone], dim=-1)
                everyone = everyone if real is None else everyone * real.unsqueeze(-1)
                sent = torch.cat([sent, everyone], dim=-1)
            return Routes(sent.mT > 0, weights.mT, load, chance)

    def gates_of(self, x: Tensor, state: MoMState, mask: Tensor | None) -> Tensor:
        logit, routes = self.b_proj(x), self.routes(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            return self._gates(logit.to(state.memory.dtype), routes).flatten(1, 2)

    def recalled(self, q: Tensor, x: Tensor, state: MoMState) -> Tensor:
        return _mixed(q.unsqueeze(1) @ state.memory, self.routes(x, None))

    def silent_state(self, x: Tensor, state: MoMState, mask: Tensor | None) -> MoMState:
        routes = self.routes(x, mask)
        shut = super().silent_state(x, state, mask)
        return shut._replace(load=routes.load, chance=routes.chance)

    def auxiliary_loss(self, before: MoMState, after: MoMState) -> Tensor | None:
        """(B,) the gates' price, and that of uneven routing: n times the sum of load times chance."""
        cost, price = super().auxiliary_loss(before, after), self.config.balance_cost
        if not price or self.config.num_memories == 1:
            return cost
        uneven = price * self.config.num_memories * (after.load * after.chance).sum(dim=1)
        return uneven if cost is None else cost + uneven

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, n H d) -> (B, M, H, T, d)."""
        x = rearrange(x, "b t (n h d) -> b n h t d", n=self.own, h=self.heads)
        return x.expand(-1, self.memories, -1, -1, -1)

    def _gates(self, logit: Tensor, routes: Routes) -> Tensor:
        """(B, T, n H) -> how far each token writes to each memory, (B, M, H, T)."""
        return self.gates_at(self._split(logit).squeeze(-1)) * routes.sent.unsqueeze(2)

    def _tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate_logit: Tensor,
        decay_logit: Tensor | None,
        dtype: torch.dtype,
        routes: Routes,
    ) -> tuple[Tokens, Tensor]:
        """What the tokens ask and do, memories and heads as one, and how far they write (B, M, H, T)."""
        q, (k, v) = self.queries(q, dtype), (self._split(t.to(dtype)) for t in (k, v))
        gate = self._gates(gate_logit.to(dtype), routes)
        k, step = self.keys_and_steps(k, gate)
        decay = None
        if decay_logit is not None:
            decay = self.log_decay(
                self._split(decay_logit.to(dtype)), gate, routes.sent.unsqueeze(2)
            ).flatten(1, 2)
        questions = q.repeat(1, self.memories, 1, 1).unsqueeze(2)
        k, v, step = (t.flatten(1, 2) for t in (k, v, step))
        return Tokens(questions, k, v, step, decay, self.rule.erases), gate


def _mixed(found: Tensor, routes: Routes) -> Tensor:
    """What the memories found (B, M, H, T, dv), by the router's weights: (B, H, T, dv)."""
    return (found * rearrange(routes.weights, "b m t -> b m 1 t 1")).sum(dim=1)
