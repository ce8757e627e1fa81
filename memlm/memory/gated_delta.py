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

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self, cast

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
    was_loaded,
)
from memlm.memory.parts.checks import check_least, head_sizes
from memlm.memory.parts.delta_kernels import run_delta_rule
from memlm.memory.parts.delta_rule import Tokens
from memlm.memory.parts.feature_maps import pair_product
from memlm.memory.parts.gates import GatedConfig, GatedMemory, gate_statistics
from memlm.memory.parts.starts import start_convolution, start_output
from memlm.memory.parts.tokens import (
    real_first_order,
    recent_inputs,
    short_convolution,
    tokens_back_from,
    tokens_in,
)

EPSILON = 1e-6


class Rule(NamedTuple):
    """What a rule of the family has. decay: "none", "head" or "channel". erases: whether a write
    first takes away what its key held. unit_keys: keys are normed; if not, the step is divided by
    the key's square."""

    decay: str
    erases: bool
    unit_keys: bool = True


RULES = {
    "linear": Rule("none", erases=False),
    "gla": Rule("channel", erases=False),
    "delta": Rule("none", erases=True),
    "gated-delta": Rule("head", erases=True),
    "kda": Rule("channel", erases=True),
    "kaczmarz": Rule("head", erases=True, unit_keys=False),
}


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
    start; 0 leaves the stage as it was.
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
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} is unknown; use one of {', '.join(RULES)}")
        if self.key_map not in ("none", "product"):
            raise ValueError(f"key_map={self.key_map!r} is unknown; use 'none' or 'product'")
        if self.key_map == "product" and not RULES[self.rule].unit_keys:
            raise ValueError(
                f"key_map='product' norms keys, and rule={self.rule!r} needs them as they are; use "
                "another rule, or key_map='none'"
            )
        self.check_gates()
        heads, size = head_sizes(self.num_heads, self.head_dim, dims)
        if self.key_map == "product" and size % 2:
            raise ValueError(f"key_map='product' halves keys; head_dim={size} must be even")
        filled = replace(
            self,
            num_heads=heads,
            head_dim=size,
            value_dim=size if self.value_dim is None else self.value_dim,
            chunk_length=64 if self.chunk_length is None else self.chunk_length,
        )
        least = dict.fromkeys(("head_dim", "value_dim", "chunk_length", "householder_steps"), 1)
        check_least(filled, least | {"conv_size": 0, "conv_std": 0, "output_std": 0})
        return filled


class GatedDeltaState(NamedTuple):
    """memory (B, H, dk, dv), float32 or wider. tails: the last conv_size - 1 inputs of the three
    convolutions, (B, conv_size - 1, n) each. written, opened (B,): the mean gate and the largest over
    the last segment's tokens."""

    memory: Tensor
    tails: tuple[Tensor, ...]
    written: Tensor
    opened: Tensor


class GatedDelta(GatedMemory):
    """Gated delta rules beside a layer's attention."""

    site: ClassVar[Site] = "attention"
    Config: ClassVar[type[MemoryConfig]] = GatedDeltaConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = GatedMemory.transient | {"tails"}
    continues: ClassVar[Continues] = Continues("write")
    config: GatedDeltaConfig

    def __init__(self, config: GatedDeltaConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_heads and config.head_dim and config.value_dim and config.chunk_length
        self.rule = RULES[config.rule]
        self.heads, self.values = config.num_heads, config.value_dim
        self.pairs = config.key_map == "product"
        self.keys = (config.head_dim // 2 + 1) ** 2 if self.pairs else config.head_dim
        self.steps, self.chunk = config.householder_steps, config.chunk_length
        hidden, steps = dims.hidden_size, self.heads * config.householder_steps
        widths = (self.heads * config.head_dim, steps * config.head_dim, steps * self.values)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden, width, bias=False) for width in widths
        )
        self.b_proj = nn.Linear(hidden, steps)
        self.kernels = nn.ParameterList(
            torch.empty(width, 1, config.conv_size) for width in widths if config.conv_size
        )
        if self.rule.decay != "none":
            decays = self.heads * (self.keys if self.rule.decay == "channel" else 1)
            self.a_proj = nn.Linear(hidden, decays, bias=False)
            self.A_log = nn.Parameter(torch.empty(self.heads))
            self.dt_bias = nn.Parameter(torch.empty(decays))
        self.g_proj = nn.Linear(hidden, self.heads * self.values, bias=False)
        self.o_norm = nn.Parameter(torch.empty(self.values))
        self.o_proj = nn.Linear(self.heads * self.values, hidden, bias=False)

    @classmethod
    def resolve(cls, config: GatedDeltaConfig, dims: Dims) -> GatedDeltaConfig:
        return config.resolved(dims)

    def reset_parameters(self, embedding_std: float) -> None:
        config = self.config
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(self.b_proj.weight, std=self.b_proj.in_features**-0.5)
        nn.init.constant_(self.b_proj.bias, config.initial_gate)
        for kernel in self.kernels:
            start_convolution(kernel, config.conv_std)
        if self.rule.decay != "none":
            nn.init.normal_(self.a_proj.weight, std=0.1 * self.a_proj.in_features**-0.5)
            if not was_loaded(self.A_log):
                with torch.no_grad():
                    self.A_log.uniform_(1.0, 16.0).log_()
            if not was_loaded(self.dt_bias):
                with torch.no_grad():
                    # softplus(dt_bias) is log-uniform from 1e-3 to 1e-1, as in Mamba.
                    step = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1))
                    self.dt_bias.copy_(step.exp().expm1().log())
        nn.init.ones_(self.o_norm)
        start_output(self.o_proj.weight, config.output_std)

    def init_state(self, batch_size: int) -> GatedDeltaState:
        dtype = accumulator_dtype(self.o_norm.dtype)
        tail = max(0, self.config.conv_size - 1)
        return GatedDeltaState(
            self.zeros(batch_size, self.heads, self.keys, self.values, dtype=dtype),
            tuple(
                self.zeros(batch_size, tail, len(kernel), dtype=dtype) for kernel in self.kernels
            ),
            self.zeros(batch_size, dtype=dtype),
            self.zeros(batch_size, dtype=dtype),
        )

    def forward(
        self,
        x: Tensor,
        state: GatedDeltaState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, GatedDeltaState]:
        answer, new = self.branch(x, state, mask)
        return inner(x) + answer, (new if write else state)

    def branch(
        self, x: Tensor, state: GatedDeltaState, mask: Tensor | None
    ) -> tuple[Tensor, GatedDeltaState]:
        """What the memory answers to `x` (B, T, D), and the state after it."""
        order, real = real_first_order(mask)
        x = tokens_in(order, x)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        (q, k, v), tails = zip(
            *(self._project(x, linear, i, state, real) for i, linear in enumerate(projections)),
            strict=True,
        )
        logits = self.b_proj(x), self.a_proj(x) if self.rule.decay != "none" else None
        with torch.autocast(x.device.type, enabled=False):
            tokens, gate = self._tokens(q, k, v, *logits, state.memory.dtype, real)
            found, memory = run_delta_rule(tokens, state.memory, self.chunk, x.dtype)
            found = found[:, :, 0, self.steps - 1 :: self.steps]
        y = self._answer(found, x)
        return tokens_back_from(order, y), GatedDeltaState(
            memory, tails if self.kernels else (), *gate_statistics(gate, real, self.steps)
        )

    def gates_of(self, x: Tensor, state: GatedDeltaState, mask: Tensor | None) -> Tensor:
        logit = self.b_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._gates(logit.to(state.memory.dtype), mask)

    def forward_silent(
        self, x: Tensor, state: GatedDeltaState, inner: Inner, *, mask: Tensor | None
    ) -> tuple[Tensor, GatedDeltaState]:
        order, real = real_first_order(mask)
        tokens = tokens_in(order, x)
        q, _ = self._project(tokens, self.q_proj, 0, state, real)
        with torch.autocast(x.device.type, enabled=False):
            found = self._queries(q, state.memory.dtype) @ state.memory
        y = tokens_back_from(order, self._answer(found, tokens))
        return inner(x) + y, self.silent_state(x, state, mask)

    def silent_state(
        self, x: Tensor, state: GatedDeltaState, mask: Tensor | None
    ) -> GatedDeltaState:
        shut = super().silent_state(x, state, mask)
        order, real = real_first_order(mask)
        tokens, linears = tokens_in(order, x), (self.q_proj, self.k_proj, self.v_proj)
        seen = zip(linears, state.tails, strict=bool(self.kernels))
        return shut._replace(
            tails=tuple(recent_inputs(tokens, old, real, linear) for linear, old in seen)
        )

    def _answer(self, found: Tensor, x: Tensor) -> Tensor:
        """What was found (B, H, T, dv), normed, gated and projected for the tokens `x` (B, T, D)."""
        with torch.autocast(x.device.type, enabled=False):
            found = F.rms_norm(found, (self.values,), self.o_norm.to(found.dtype), EPSILON)
            found = rearrange(found, "b h t d -> b t (h d)").to(x.dtype)
        return self.o_proj(found * F.silu(self.g_proj(x)))

    def _queries(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, H d) -> (B, H, T, dk), normed and scaled, in `dtype`."""
        q = rearrange(q.to(dtype), "b t (h d) -> b h t d", h=self.heads)
        return self._normed(q) * self.keys**-0.5

    def _normed(self, x: Tensor) -> Tensor:
        """Queries or keys (..., d), of length 1, as they ask and are stored: (..., dk)."""
        return pair_product(x) if self.pairs else F.normalize(x, dim=-1)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, n H d) -> (B, H, T n, d)."""
        return rearrange(x, "b t (n h d) -> b h (t n) d", n=self.steps, h=self.heads)

    def _gates(self, logit: Tensor, real: Tensor | None) -> Tensor:
        """(B, T, n H) -> how far each token writes, (B, H, T n)."""
        gate = self.gates_at(self._split(logit).squeeze(-1))
        if real is None:
            return gate
        return gate * real.repeat_interleave(self.steps, dim=1).unsqueeze(1)

    def _project(
        self, x: Tensor, linear: nn.Linear, stream: int, state: GatedDeltaState, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, n) through projection, short convolution and SiLU; the new tail."""
        z = linear(x)
        tail = z
        if self.kernels:
            kernel = cast(Tensor, self.kernels[stream])
            z, tail = short_convolution(z, kernel, state.tails[stream], real)
        return F.silu(z), tail

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
        steps, q = self.steps, self._queries(q, dtype)
        k, v = self._split(k.to(dtype)), self._split(v.to(dtype))
        gate = self._gates(gate_logit.to(dtype), real)
        if self.rule.unit_keys:
            k = self._normed(k)
        reach = 2 if self.config.negative_eigenvalues else 1
        step = reach * gate
        if not self.rule.unit_keys:
            step = step / (k.square().sum(dim=-1) + EPSILON)
        log_decay = None
        if decay_logit is not None:
            log_decay = self._log_decay(decay_logit.to(dtype), gate, real)
        if steps > 1:
            # Everything happens at micro-steps; a token asks after its last, and decays before its first.
            q = self._at(q, steps - 1)
            log_decay = None if log_decay is None else self._at(log_decay, 0)
        return Tokens(q.unsqueeze(2), k, v, step, log_decay, self.rule.erases), gate

    def _log_decay(self, logit: Tensor, gate: Tensor, real: Tensor | None) -> Tensor:
        """(B, H, T) or (B, H, T, dk): none where nothing is written, if the gate says so."""
        speed = F.softplus(logit + self.dt_bias.to(logit.dtype))
        speed = rearrange(speed, "b t (h d) -> b h t d", h=self.heads)
        log_decay = -self.A_log.to(logit.dtype).exp()[:, None, None] * speed
        most = gate.unflatten(2, (-1, self.steps)).amax(dim=3).unsqueeze(-1)
        if self.config.write_gate == "hard":
            log_decay = log_decay * most
        elif self.threshold:
            log_decay = torch.where(most == 0, 0.0, log_decay)
        elif real is not None:
            log_decay = log_decay * real[:, None, :, None]
        return log_decay if self.rule.decay == "channel" else log_decay.squeeze(-1)

    def _at(self, x: Tensor, place: int) -> Tensor:
        """(B, H, T, ...) -> (B, H, T n, ...): at one of each token's micro-steps, zero at the others."""
        spread = x.new_zeros(*x.shape[:3], self.steps, *x.shape[3:])
        spread[:, :, :, place] = x
        return spread.flatten(2, 3)
