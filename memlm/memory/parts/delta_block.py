"""The block of Gated DeltaNet (Yang et al. 2024), beside a layer's attention, for memories of delta rules.

Short convolutions, SiLU, normed queries and keys, write gates and decays, a normed and gated output. What a
memory does in between, with `parts.delta_rule`, is its own.

Letters: n sets of keys, values and gates that a token has.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memlm.memory.base import Continues, Dims, Inner, Site, accumulator_dtype, was_loaded
from memlm.memory.parts.checks import check_least, head_sizes
from memlm.memory.parts.gates import GatedConfig, GatedMemory
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

Config = TypeVar("Config", bound=GatedConfig)


def rule_called(name: str) -> Rule:
    """The rule called `name`. ValueError when there is none."""
    if name not in RULES:
        raise ValueError(f"rule={name!r} is unknown; use one of {', '.join(RULES)}")
    return RULES[name]


def filled(config: Config, dims: Dims) -> Config:
    """`config` with the sizes that it leaves open from `dims`; ValueError for what cannot be."""
    given: Any = config
    rule_called(given.rule)
    config.check_gates()
    heads, size = head_sizes(given.num_heads, given.head_dim, dims)
    full: Any = replace(
        given,
        num_heads=heads,
        head_dim=size,
        value_dim=size if given.value_dim is None else given.value_dim,
        chunk_length=64 if given.chunk_length is None else given.chunk_length,
    )
    ones, zeros = ("head_dim", "value_dim", "chunk_length"), ("conv_size", "conv_std", "output_std")
    check_least(full, dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0))
    return full


class DeltaBlock(GatedMemory):
    """A block around delta rules.

    Its config has `rule`, `num_heads`, `head_dim`, `value_dim`, `conv_size`, `chunk_length`,
    `initial_gate`, `conv_std` and `output_std`, and is `filled`. Its state has, beside the leaves of every
    gated memory, `memory` (B, ..., dk, dv) and `tails`, the last conv_size - 1 inputs of the three
    convolutions, (B, conv_size - 1, width) each.

    sets: keys, values and gates per token. keys: their size as they are stored. decays: sets of decays per
    token. shared_kernels: whether all sets go through the same convolution.
    """

    site: ClassVar[Site] = "attention"
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    transient: ClassVar[frozenset[str]] = GatedMemory.transient | {"tails"}
    continues: ClassVar[Continues] = Continues("write")
    config: Any

    def __init__(
        self,
        config: Any,
        dims: Dims,
        *,
        sets: int,
        keys: int,
        decays: int = 1,
        shared_kernels: bool = False,
    ) -> None:
        super().__init__(config, dims)
        self.rule, self.chunk = rule_called(config.rule), config.chunk_length
        self.heads, self.keys, self.values = config.num_heads, keys, config.value_dim
        hidden, each = dims.hidden_size, self.heads * config.head_dim
        single = (each, each, self.heads * self.values)
        widths = (each, sets * each, sets * single[2])
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden, width, bias=False) for width in widths
        )
        self.b_proj = nn.Linear(hidden, sets * self.heads)
        self.kernels = nn.ParameterList(
            torch.empty(width, 1, config.conv_size)
            for width in (single if shared_kernels else widths)
            if config.conv_size
        )
        if self.rule.decay != "none":
            rates = self.heads * (keys if self.rule.decay == "channel" else 1)
            self.a_proj = nn.Linear(hidden, decays * rates, bias=False)
            self.A_log = nn.Parameter(torch.empty(self.heads))
            self.dt_bias = nn.Parameter(torch.empty(rates))
        self.g_proj = nn.Linear(hidden, self.heads * self.values, bias=False)
        self.o_norm = nn.Parameter(torch.empty(self.values))
        self.o_proj = nn.Linear(self.heads * self.values, hidden, bias=False)

    def reset_parameters(self, embedding_std: float) -> None:
        config = self.config
        for linear in (*self._projections(), self.g_proj, self.b_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
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

    def empty(self, batch_size: int, *shape: int) -> Tensor:
        """Zeros (B, ...) in the dtype that states accumulate in."""
        return self.zeros(batch_size, *shape, dtype=accumulator_dtype(self.o_norm.dtype))

    def empty_tails(self, batch_size: int) -> tuple[Tensor, ...]:
        """The convolutions' inputs before the first token."""
        size = self.config.conv_size - 1
        widths = [linear.out_features for linear in self._projections()] if self.kernels else []
        return tuple(self.empty(batch_size, size, width) for width in widths)

    def forward(
        self, x: Tensor, state: Any, inner: Inner, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, Any]:
        answer, new = self.branch(x, state, mask)
        return inner(x) + answer, (new if write else state)

    @abstractmethod
    def branch(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        """What the memory answers to `x` (B, T, D), and the state after it."""

    @abstractmethod
    def recalled(self, q: Tensor, x: Tensor, state: Any) -> Tensor:
        """What `state`, as it is, holds for queries (B, H, T, dk) of the tokens `x`: (B, H, T, dv)."""

    def forward_silent(
        self, x: Tensor, state: Any, inner: Inner, *, mask: Tensor | None
    ) -> tuple[Tensor, Any]:
        order, real = real_first_order(mask)
        tokens = tokens_in(order, x)
        q, _ = self._project(tokens, 0, state, real)
        with torch.autocast(x.device.type, enabled=False):
            found = self.recalled(self.queries(q, state.memory.dtype), tokens, state)
        y = tokens_back_from(order, self.answer(found, tokens))
        return inner(x) + y, self.silent_state(x, state, mask)

    def silent_state(self, x: Tensor, state: Any, mask: Tensor | None) -> Any:
        shut = super().silent_state(x, state, mask)
        order, real = real_first_order(mask)
        tokens = tokens_in(order, x)
        seen = zip(self._projections(), state.tails, strict=bool(self.kernels))
        return shut._replace(
            tails=tuple(recent_inputs(tokens, old, real, linear) for linear, old in seen)
        )

    def streams(
        self, x: Tensor, state: Any, real: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        """Queries, keys and values of `x` (B, T, D), real tokens first, and the new tails."""
        (q, k, v), tails = zip(*(self._project(x, i, state, real) for i in range(3)), strict=True)
        return (q, k, v), tails if self.kernels else ()

    def logits(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the write gates of `x` (B, T, D), and of the decays where the rule has them."""
        return self.b_proj(x), self.a_proj(x) if self.rule.decay != "none" else None

    def normed(self, x: Tensor) -> Tensor:
        """Queries or keys (..., d), of length 1, as they ask and are stored: (..., dk)."""
        return F.normalize(x, dim=-1)

    def queries(self, q: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, H d) -> (B, H, T, dk), normed and scaled, in `dtype`."""
        q = rearrange(q.to(dtype), "b t (h d) -> b h t d", h=self.heads)
        return self.normed(q) * self.keys**-0.5

    def keys_and_steps(self, k: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (..., d) as they are stored, (..., dk), and how far a write under a gate (...) goes."""
        if self.rule.unit_keys:
            return self.normed(k), gate
        return k, gate / (k.square().sum(dim=-1) + EPSILON)

    def log_decay(self, logit: Tensor, gate: Tensor, real: Tensor | None) -> Tensor:
        """(..., H, T, c) -> (..., H, T), or (..., H, T, dk) by channel: logarithms of the decays.

        None where nothing is written, if the gate (..., H, T) says so, and none where `real`, which has the
        shape of the gate or is broadcast to it, is False.
        """
        speed = F.softplus(logit + self.dt_bias.to(logit.dtype).unflatten(0, (self.heads, 1, -1)))
        found = -self.A_log.to(logit.dtype).exp()[:, None, None] * speed
        if self.config.write_gate == "hard":
            found = found * gate.unsqueeze(-1)
        elif self.threshold:
            found = torch.where(gate.unsqueeze(-1) == 0, 0.0, found)
        elif real is not None:
            found = found * real.unsqueeze(-1)
        return found if self.rule.decay == "channel" else found.squeeze(-1)

    def answer(self, found: Tensor, x: Tensor) -> Tensor:
        """What was found (B, H, T, dv), normed, gated and projected for the tokens `x` (B, T, D)."""
        return answered(found, x, self.o_norm, self.g_proj, self.o_proj)

    def _projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    def _project(
        self, x: Tensor, stream: int, state: Any, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, width) through projection, short convolution and SiLU; the new tail."""
        z = self._projections()[stream](x)
        tail = z
        if self.kernels:
            kernel = cast(Tensor, self.kernels[stream])
            if len(kernel) < z.shape[-1]:
                kernel = kernel.repeat(z.shape[-1] // len(kernel), 1, 1)
            z, tail = short_convolution(z, kernel, state.tails[stream], real)
        return F.silu(z), tail


def answered(found: Tensor, x: Tensor, norm: Tensor, gate: nn.Module, output: nn.Module) -> Tensor:
    """What was found (B, H, T, dv), normed, gated and projected for the tokens `x` (B, T, D): (B, T, D)."""
    with torch.autocast(x.device.type, enabled=False):
        found = F.rms_norm(found, norm.shape, norm.to(found.dtype), EPSILON)
        found = rearrange(found, "b h t d -> b t (h d)").to(x.dtype)
    return output(found * F.silu(gate(x)))
