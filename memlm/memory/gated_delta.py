"""Gated delta rules: a linear memory beside a layer's attention (Yang et al. 2024, *Gated Delta
Networks*).

Every token is read and written, chunk by chunk, by the recurrence of `parts.delta_rule`; `rule`
says which of its family: linear attention, GLA, DeltaNet, Gated DeltaNet, KDA or Kaczmarz linear
attention. The block is that of the paper: short convolutions, SiLU, normed queries and keys, a
normed and gated output. It stands as a branch beside the attention, with an output projection of
zeros, so that a base model is left as it was.

Not in the papers: the hard write gate. It multiplies all that a token does, its decay too, and
reaches zero exactly, so that what is not worth remembering leaves the state as it was, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

import torch
from einops import rearrange
from torch import Tensor

from memlm.memory.base import Dims, MemoryConfig, live_option, option
from memlm.memory.parts.checks import check_least
from memlm.memory.parts.delta_block import DeltaBlock, filled, rule_called
from memlm.memory.parts.delta_kernels import run_delta_rule
from memlm.memory.parts.delta_rule import Tokens
from memlm.memory.parts.feature_maps import pair_product
from memlm.memory.parts.gates import GatedConfig, gate_statistics
from memlm.memory.parts.tokens import real_first_order, tokens_back_from, tokens_in


@dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(GatedConfig):
    """Options of the gated delta rules.

    rule: "linear", "gla", "delta" (DeltaNet), "gated-delta", "kda" or "kaczmarz". num_heads: heads
    of the memory, None for the base's; head_dim: size of queries and keys, None for hidden size /
    heads; value_dim: size of values, None for head_dim. key_map: "product" takes a query and a key for two
    halves and asks by their outer product, so that a fact may be kept under a pair of words
    (`parts.feature_maps.pair_product`); "none" takes them as they are. householder_steps: writes per token
    (DeltaProduct), each with keys, values and gates of its own, the token's decay before the first.
    negative_eigenvalues: gates reach 2, so that a write may turn what it erases round. conv_size:
    width of the short convolutions, 0 for none. chunk_length: tokens computed at once, None for 64;
    only rounding depends on it. write_gate: "sigmoid", the papers', or "hard", which shuts off the
    decay as well; it and what goes with it: as in `GatedConfig`. initial_gate: the write gate's
    logit at the start. conv_std: scale of the convolutions' taps at the start; 0 starts them as if they
    were not there. From scratch a random start saves the time in which no query and no key look back,
    so that neither has a reason to begin (0.3 did). output_std: scale of the output projection at the
    start; 0 leaves the stage as it was. read_dropout: in training, the share of rows that go without the
    answers of a layer, drawn anew per layer and segment (as LayerDrop drops layers, Fan et al. 2020,
    section 3; nothing is rescaled). Without it each fact is kept by whichever layer happened to learn it
    first, and an answer that needs two reads may find them in the wrong order; with it every layer
    learns all of them (docs/log.md).
    """

    rule: str = "gated-delta"
    num_heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    key_map: str = "none"
    householder_steps: int = 1
    negative_eigenvalues: bool = False
    conv_size: int = 4
    chunk_length: int | None = option(None)
    initial_gate: float = option(0.0)
    conv_std: float = option(0.0)
    output_std: float = option(0.0)
    read_dropout: float = live_option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """Gated DeltaNet's at 1.3B: 6 heads, keys of 256, values of 512, convolutions of 4.

        The heads are the published code's, as are the convolutions' taps: there uniform to 1/2 either way.
        output_std stays at 0, where the paper's projection starts random.
        """
        return cls(
            rule="gated-delta",
            num_heads=6,
            head_dim=256,
            value_dim=512,
            conv_size=4,
            conv_std=12**-0.5,
        )

    def resolved(self, dims: Dims) -> Self:
        """Fill what is open from `dims`; ValueError for what cannot be."""
        rule = rule_called(self.rule)
        if self.key_map not in ("none", "product"):
            raise ValueError(f"key_map={self.key_map!r} is unknown; use 'none' or 'product'")
        if self.key_map == "product" and not rule.unit_keys:
            raise ValueError(
                f"key_map='product' norms keys, and rule={self.rule!r} needs them as they are; use "
                "another rule, or key_map='none'"
            )
        full = filled(self, dims)
        check_least(full, {"householder_steps": 1})
        if not 0 <= full.read_dropout < 1:
            raise ValueError(f"read_dropout={full.read_dropout} must be from 0 to below 1")
        assert full.head_dim is not None
        if self.key_map == "product" and full.head_dim % 2:
            raise ValueError(
                f"key_map='product' halves keys; head_dim={full.head_dim} must be even"
            )
        return full


class GatedDeltaState(NamedTuple):
    """memory (B, H, dk, dv), float32 or wider. tails: the last conv_size - 1 inputs of the three
    convolutions, (B, conv_size - 1, n) each. written, opened (B,): the mean gate and the largest over
    the last segment's tokens."""

    memory: Tensor
    tails: tuple[Tensor, ...]
    written: Tensor
    opened: Tensor


class GatedDelta(DeltaBlock):
    """Gated delta rules beside a layer's attention."""

    Config: ClassVar[type[MemoryConfig]] = GatedDeltaConfig
    config: GatedDeltaConfig

    def __init__(self, config: GatedDeltaConfig, dims: Dims) -> None:
        assert config.head_dim is not None
        self.pairs = config.key_map == "product"
        self.steps = config.householder_steps
        keys = (config.head_dim // 2 + 1) ** 2 if self.pairs else config.head_dim
        super().__init__(config, dims, sets=self.steps, keys=keys)

    @classmethod
    def resolve(cls, config: GatedDeltaConfig, dims: Dims) -> GatedDeltaConfig:
        return config.resolved(dims)

    def init_state(self, batch_size: int) -> GatedDeltaState:
        return GatedDeltaState(
            self.empty(batch_size, self.heads, self.keys, self.values),
            self.empty_tails(batch_size),
            self.empty(batch_size),
            self.empty(batch_size),
        )

    def branch(
        self, x: Tensor, state: GatedDeltaState, mask: Tensor | None
    ) -> tuple[Tensor, GatedDeltaState]:
        order, real = real_first_order(mask)
        x = tokens_in(order, x)
        parts, tails = self.streams(x, state, real)
        logits = self.logits(x)
        with torch.autocast(x.device.type, enabled=False):
            tokens, gate = self._tokens(*parts, *logits, state.memory.dtype, real)
            found, memory = run_delta_rule(tokens, state.memory, self.chunk, x.dtype)
            found = found[:, :, 0, self.steps - 1 :: self.steps]
        y = self.answer(found, x)
        return tokens_back_from(order, y), GatedDeltaState(
            memory, tails, *gate_statistics(gate, real, self.steps)
        )

    def gates_of(self, x: Tensor, state: GatedDeltaState, mask: Tensor | None) -> Tensor:
        logit = self.b_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._gates(logit.to(state.memory.dtype), mask)

    def recalled(self, q: Tensor, x: Tensor, state: GatedDeltaState) -> Tensor:
        return q @ state.memory

    def answer(self, found: Tensor, x: Tensor) -> Tensor:
        y = super().answer(found, x)
        if not (self.training and self.config.read_dropout):
            return y
        return y * (torch.rand(len(y), 1, 1, device=y.device) >= self.config.read_dropout)

    def normed(self, x: Tensor) -> Tensor:
        return pair_product(x) if self.pairs else super().normed(x)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, n H d) -> (B, H, T n, d)."""
        return rearrange(x, "b t (n h d) -> b h (t n) d", n=self.steps, h=self.heads)

    def _gates(self, logit: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, n H) -> how far each token writes, (B, H, T n)."""
        gate = self.gates_at(self._split(logit).squeeze(-1))
        if real is None:
            return gate
        return gate * real.repeat_interleave(self.steps, dim=1).unsqueeze(1)

    def _tokens(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate_logit: Tensor,
        decay_logit: Tensor | None,
        dtype: torch.dtype,
        real: Tensor | None,
    ) -> tuple[Tokens, Tensor]:
        """What the tokens ask and do, in `dtype`, and how far they write, (B, H, T n)."""
        q, (k, v) = self.queries(q, dtype), (self._split(t.to(dtype)) for t in (k, v))
        gate = self._gates(gate_logit.to(dtype), real)
        k, step = self.keys_and_steps(k, 2 * gate if self.config.negative_eigenvalues else gate)
        decay = None
        if decay_logit is not None:
            logit = rearrange(decay_logit.to(dtype), "b t (h c) -> b h t c", h=self.heads)
            most = gate.unflatten(2, (-1, self.steps)).amax(dim=3)
            decay = self.log_decay(logit, most, None if real is None else real.unsqueeze(1))
        if self.steps > 1:
            # Everything happens at micro-steps; a token asks after its last, and decays before its first.
            q = self._at(q, self.steps - 1)
            decay = None if decay is None else self._at(decay, 0)
        return Tokens(q.unsqueeze(2), k, v, step, decay, self.rule.erases), gate

    def _at(self, x: Tensor, place: int) -> Tensor:
        """(B, H, T, ...) -> (B, H, T n, ...): at one of each token's micro-steps, zero at the others."""
        spread = x.new_zeros(*x.shape[:3], self.steps, *x.shape[3:])
        spread[:, :, :, place] = x
        return spread.flatten(2, 3)
