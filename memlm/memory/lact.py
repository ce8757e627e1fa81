"""LaCT: fast weights that are trained once per segment, after it has been read (Zhang et al. 2025,
*Test-Time Training Done Right*: large-chunk test-time training).

Per row and head, an MLP with gates whose weights are the state, with the paper's W transposed, as rows
are multiplied from the left:

    f(x) = (silu(x W0) * (x W2)) W1                     x (d,), W0, W2 (d, m), W1 (m, d)

Every token of a segment is answered by the weights that earlier segments left: o_t = f(q_t). Then the
segment's tokens take one step together, up the gradient of sum_t r_t f(k_t) . v_t, with rates r per token
and matrix: with momentum, made orthogonal (Muon) where that is asked for, and the columns of the weights,
one per output, brought back to the norm they had at the start.

Not in the paper: the write gate. After Muon, and after the norm, a step has its full size whatever the
rates, so every segment of filler would write over what is held. Here tokens have gates, a token's rate is
multiplied by its own, and the whole step by the largest in the segment: shut gates leave the weights and
the momentum as they were, to the bit.

Letters: m hidden size of the MLP, d head size.
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
from memlm.memory.parts.gates import GatedConfig, GatedMemory, gate_statistics
from memlm.memory.parts.orthogonal import orthogonal
from memlm.memory.parts.starts import start_output

Weights = tuple[Tensor, Tensor, Tensor]

NORMS = ("post", "pre")
# The paper's rate times its chunk: what a segment's rates come to at the start.
INITIAL_STEP = 0.001 * 2048
# Added to norms before they divide, as in the authors' code.
EPSILON, OUTPUT_EPSILON = 1e-5, 1e-6


@dataclass(frozen=True, kw_only=True)
class LaCTConfig(GatedConfig):
    """Options of LaCT.

    num_heads: heads of the memory, few and large as in the paper; head_dim: their size, None for
    hidden size / heads; expansion: hidden size of the fast MLP in head sizes. momentum: whether a
    step carries on those before it. muon: whether it is made orthogonal. norm: "post" keeps the
    weights at the norm they started with, so that old segments fade with every step; "pre" keeps
    the sum of all steps and norms it for use, so that they fade like parts of an average.
    initial_rate: the rates at the start, None for the paper's 0.001 x 2048 / segment length.
    write_gate: "sigmoid", "hard", or "none", the paper's rule, a full step for every segment; it and
    what goes with it: as in `GatedConfig`. initial_gate: the write gate's logit at the start.
    output_std: scale of the output projection at the start; 0 leaves the stage as it was.
    """

    num_heads: int = 4
    head_dim: int | None = None
    expansion: int = 1
    momentum: bool = True
    muon: bool = False
    norm: str = "post"
    initial_rate: float | None = option(None)
    initial_gate: float = option(0.0)
    output_std: float = option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """The paper's language model: four heads, momentum, Muon, no write gate.

        Its segments have 2,048 tokens.
        """
        return cls(muon=True, write_gate="none", initial_rate=0.001)

    def resolved(self, dims: Dims) -> Self:
        """Fill what is open from `dims`; ValueError for what cannot be."""
        self.check_gates(("none", "sigmoid", "hard"))
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is unknown; use one of {', '.join(NORMS)}")
        _, size = head_sizes(self.num_heads, self.head_dim, dims)
        rate = self.initial_rate
        if rate is None:
            rate = INITIAL_STEP / dims.segment_length
        if not rate > 0:
            raise ValueError(f"initial_rate={rate} must be above 0")
        filled = replace(self, head_dim=size, initial_rate=rate)
        check_least(filled, {"head_dim": 1, "expansion": 1, "output_std": 0})
        return filled


class LaCTState(NamedTuple):
    """weights W0, W1, W2 and the momentum of each, (B, H, n_in, n_out), float32 or wider.

    momentum is empty without it. written, opened (B,): the mean gate and the largest over the last
    segment's tokens; () without gates.
    """

    weights: Weights
    momentum: Weights | tuple[()]
    written: Tensor | tuple[()] = ()
    opened: Tensor | tuple[()] = ()


def answer(x: Tensor, weights: Weights) -> Tensor:
    """f(x): (B, H, T, d) -> (B, H, T, d)."""
    w0, w1, w2 = weights
    return (F.silu(x @ w0) * (x @ w2)) @ w1


def ascent(k: Tensor, v: Tensor, rates: Tensor, weights: Weights) -> Weights:
    """Gradients of sum_t r_t f(k_t) . v_t, each matrix with its own rates: rates (3, B, H, T, 1)."""
    w0, w1, w2 = weights
    first, second, back = k @ w0, k @ w2, v @ w1.mT
    gate = torch.sigmoid(first)
    opened = first * gate
    slope = gate * (1 + first * (1 - gate))
    return (
        k.mT @ (rates[0] * back * second * slope),
        (opened * second).mT @ (rates[1] * v),
        k.mT @ (rates[2] * back * opened),
    )


def normed(weight: Tensor, start: Tensor) -> Tensor:
    """`weight` (B, H, n, m) with the norms that the columns of `start` (H, n, m) have."""
    norm = torch.linalg.vector_norm(weight, dim=-2, keepdim=True) + EPSILON
    return weight * (torch.linalg.vector_norm(start, dim=-2, keepdim=True) / norm)


class LaCT(GatedMemory):
    """Large-chunk test-time training beside a layer's attention."""

    site: ClassVar[Site] = "attention"
    Config: ClassVar[type[MemoryConfig]] = LaCTConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("read")
    config: LaCTConfig

    def __init__(self, config: LaCTConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.head_dim
        self.heads, self.size = config.num_heads, config.head_dim
        hidden, inner, wide = dims.hidden_size, self.heads * self.size, config.expansion * self.size
        self.qkv_proj = nn.Linear(hidden, 3 * inner, bias=False)
        # Per head: a rate for each of the three matrices, and momentum.
        self.rate_proj = nn.Linear(hidden, 3 * self.heads)
        self.momentum_proj = nn.Linear(hidden, self.heads) if config.momentum else None
        self.gate_proj = nn.Linear(hidden, self.heads) if config.write_gate != "none" else None
        self.initial = nn.ParameterList(
            torch.empty(self.heads, *shape)
            for shape in ((self.size, wide), (wide, self.size), (self.size, wide))
        )
        self.o_norm = nn.Parameter(torch.empty(self.size))
        self.scale_proj = nn.Linear(hidden, self.heads)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    @classmethod
    def resolve(cls, config: LaCTConfig, dims: Dims) -> LaCTConfig:
        return config.resolved(dims)

    def reset_parameters(self, embedding_std: float) -> None:
        config = self.config
        assert config.initial_rate
        for linear in (self.qkv_proj, self.scale_proj):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.scale_proj.bias)
        for gates in (self.rate_proj, self.momentum_proj, self.gate_proj):
            if gates is not None:
                nn.init.normal_(gates.weight, std=0.1 * gates.in_features**-0.5)
                nn.init.zeros_(gates.bias)
        if self.gate_proj is not None:
            nn.init.constant_(self.gate_proj.bias, config.initial_gate)
        # softplus of it is the rate.
        rate = config.initial_rate
        nn.init.constant_(self.rate_proj.bias, rate + math.log(-math.expm1(-rate)))
        for weight in self.initial:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.ones_(self.o_norm)
        start_output(self.o_proj.weight, config.output_std)

    def init_state(self, batch_size: int) -> LaCTState:
        dtype = accumulator_dtype(self.o_norm.dtype)
        w0, w1, w2 = (w.to(dtype).expand(batch_size, -1, -1, -1) for w in self.initial)
        weights = w0, w1, w2
        still = torch.zeros_like(w0), torch.zeros_like(w1), torch.zeros_like(w2)
        gates = () if self.gate_proj is None else self.zeros(batch_size, dtype=dtype)
        return LaCTState(weights, still if self.config.momentum else (), gates, gates)

    def forward(
        self,
        x: Tensor,
        state: LaCTState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, LaCTState]:
        q, k, v = F.silu(self.qkv_proj(x)).chunk(3, dim=-1)
        weights = self._used(state)
        y = inner(x) + self.read(x, q, weights)
        return y, (self.write(x, k, v, weights, state, mask) if write else state)

    def gates_of(self, x: Tensor, state: LaCTState, mask: Tensor | None) -> Tensor | None:
        if self.gate_proj is None:
            return None
        logit = self.gate_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            gate = self.gates_at(logit.to(state.weights[0].dtype).mT)
            return gate if mask is None else gate * mask.unsqueeze(1)

    def forward_silent(
        self, x: Tensor, state: LaCTState, inner: Inner, *, mask: Tensor | None
    ) -> tuple[Tensor, LaCTState]:
        y, state = self(x, state, inner, mask=mask, write=False)
        return y, self.silent_state(x, state, mask)

    def read(self, x: Tensor, q: Tensor, weights: Weights) -> Tensor:
        """What the fast weights answer to the tokens `x` (B, T, D) with queries `q` (B, T, H d)."""
        scale = F.silu(self.scale_proj(x))
        with torch.autocast(x.device.type, enabled=False):
            found = answer(F.normalize(self._heads(q, weights), dim=-1), weights)
            found = F.rms_norm(found, (self.size,), self.o_norm.to(found.dtype), OUTPUT_EPSILON)
            found = found * scale.to(found.dtype).mT.unsqueeze(-1)
            found = rearrange(found, "b h t d -> b t (h d)").to(x.dtype)
        return self.o_proj(found)

    def write(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        weights: Weights,
        state: LaCTState,
        mask: Tensor | None,
    ) -> LaCTState:
        """The state after the segment's step; k and v (B, T, H d), `weights` those that are in use."""
        rate = self.rate_proj(x)
        momentum = None if self.momentum_proj is None else self.momentum_proj(x)
        opening = None if self.gate_proj is None else self.gate_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = weights[0].dtype
            rate = rate.to(wide).mT  # (B, 3 H, T)
            real = torch.ones_like(rate[:, :1]) if mask is None else mask.to(wide).unsqueeze(1)
            # (B, H, T), or one for all heads.
            gate = real if opening is None else real * self.gates_at(opening.to(wide).mT)
            rates = gate * F.softplus(rate).unflatten(1, (3, self.heads)).transpose(0, 1)
            k = F.normalize(self._heads(k, weights), dim=-1)
            steps = ascent(k, self._heads(v, weights), rates.unsqueeze(-1), weights)
            most = gate.amax(dim=2)[..., None, None]
            count = real.sum(dim=2).clamp(min=1)  # (B, 1)
            if momentum is not None:
                kept = (real * torch.sigmoid(momentum.to(wide).mT)).sum(dim=2) / count
                # 1, and the momentum as it was, where the gates are shut.
                kept = 1 - most * (1 - kept[..., None, None])
                s0, s1, s2 = (kept * m + s for m, s in zip(state.momentum, steps, strict=True))
                steps = s0, s1, s2
            w0, w1, w2 = (
                self._stepped(weight, step, most, start)
                for weight, step, start in zip(state.weights, steps, self.initial, strict=True)
            )
            new = LaCTState((w0, w1, w2), steps if state.momentum else ())
            if opening is None:
                return new
            written, largest = gate_statistics(gate, mask)
            return new._replace(written=written, opened=largest)

    def _heads(self, x: Tensor, weights: Weights) -> Tensor:
        """(B, T, H d) -> (B, H, T, d) in the dtype of the weights."""
        return rearrange(x.to(weights[0].dtype), "b t (h d) -> b h t d", h=self.heads)

    def _used(self, state: LaCTState) -> Weights:
        """The weights that read and learn."""
        if self.config.norm == "post":
            return state.weights
        w0, w1, w2 = (
            normed(weight, start.to(weight.dtype))
            for weight, start in zip(state.weights, self.initial, strict=True)
        )
        return w0, w1, w2

    def _stepped(self, weight: Tensor, step: Tensor, most: Tensor, start: Tensor) -> Tensor:
        """`weight` (B, H, n, m) after `step`, taken as far as the gate `most` (B, H, 1, 1) is open."""
        new = weight + most * (orthogonal(step) if self.config.muon else step)
        if self.config.norm == "post":
            # Norming again what is normed would still round it.
            new = torch.where(most == 0, weight, normed(new, start.to(weight.dtype)))
        return new
