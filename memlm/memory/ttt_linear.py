"""TTT-Linear: a linear model per row and head that is trained, token by token, to give values back from
keys (Sun et al. 2024, *Learning to (Learn at Test Time)*, section 2).

The state is the model f(x) = x + LN(x W + b). A mini-batch is C tokens whose gradients are all taken at
the W and b it began with; a token reads with the steps up to its own taken:

    loss_i = 1/2 || f(k_i) - v_i ||^2
    W_t = W - c_t sum_{i <= t} r_i dloss_i/dW          o_t = f(q_t; W_t, b_t), b alike

r_i is the rate of the token that teaches. c_t belongs to the place of the token that reads: 1 / t and a
learned part. So W_t is not what the next token's step begins with, and a mini-batch that a segment leaves
open is carried as W, b, the sums of r_i times the gradients, and the count of its tokens: going on from
these is exact wherever a segment ends. Tokens stand in mini-batches by their place in the document, so
each row's mini-batches begin at a place of their own. The equations are in `parts.linear_model`.

Letters: C tokens of a mini-batch, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
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
from memlm.memory.parts.linear_model import EPSILON, LinearModel, Norm, told_in_mini_batches, turned
from memlm.memory.parts.starts import start_convolution, start_output
from memlm.memory.parts.tokens import (
    real_first_order,
    short_convolution,
    tokens_at,
    tokens_back_from,
    tokens_in,
)

# Of W at the start, and of the projection that the rates come from.
WEIGHT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class TTTLinearConfig(MemoryConfig):
    """Options of TTT-Linear.

    num_heads: heads of the memory, None for the base's; head_dim: their size, even, None for hidden size /
    heads. mini_batch: tokens whose gradients are taken at the same weights. base_rate: largest rate of a
    token, in units of 1 / head_dim. conv_size: width of the short convolutions that make queries and keys
    out of one projection; 0 for none, and a projection for each. gated: whether the output is multiplied
    by GELU(W x). Both as in the paper's Mamba backbone; without them as in its Transformer backbone.
    initial_rate: where the rates start, as a share of the largest. conv_std: scale of the convolutions'
    taps at the start; 0 starts them as if they were not there. output_std: scale of the output
    projection at the start; 0 leaves the stage as it was.
    """

    num_heads: int | None = None
    head_dim: int | None = None
    mini_batch: int = 16
    base_rate: float = 1.0
    conv_size: int = 4
    gated: bool = True
    initial_rate: float = option(0.5)
    conv_std: float = option(0.0)
    output_std: float = option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """The paper's with the Mamba backbone, and taps as torch starts them, 1/2 either way."""
        return cls(mini_batch=16, conv_size=4, gated=True, conv_std=12**-0.5)

    def resolved(self, dims: Dims) -> Self:
        """Fill what is open from `dims`; ValueError for what cannot be."""
        heads, size = head_sizes(self.num_heads, self.head_dim, dims)
        filled = replace(self, num_heads=heads, head_dim=size)
        zero = {"conv_size": 0, "conv_std": 0, "output_std": 0}
        check_least(filled, {"head_dim": 2, "mini_batch": 1, **zero})
        if size % 2:
            raise ValueError(f"head_dim={size} must be even, since places turn pairs of channels")
        if not self.base_rate > 0:
            raise ValueError(f"base_rate={self.base_rate} must be above 0")
        if not 0 < self.initial_rate < 1:
            raise ValueError(f"initial_rate={self.initial_rate} must lie between 0 and 1")
        return filled


class TTTLinearState(NamedTuple):
    """model: W and b where the open mini-batch began; steps: the sums of r_i times its gradients; both
    float32 or wider. filled (B,): its tokens, 0 to C - 1. tail (B, conv_size - 1, H d): the last inputs of
    the convolutions, or ()."""

    model: LinearModel
    steps: LinearModel
    filled: Tensor
    tail: Tensor | tuple[()]


class TTTLinear(Memory):
    """TTT-Linear beside a layer's attention."""

    site: ClassVar[Site] = "attention"
    Config: ClassVar[type[MemoryConfig]] = TTTLinearConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("write")
    config: TTTLinearConfig

    def __init__(self, config: TTTLinearConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_heads and config.head_dim
        self.heads, self.size, self.length = config.num_heads, config.head_dim, config.mini_batch
        hidden, width = dims.hidden_size, self.heads * self.size
        streams = 1 if config.conv_size else 2
        self.qk_proj = nn.Linear(hidden, streams * width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        taps = torch.empty(2 * width, 1, config.conv_size) if config.conv_size else None
        self.kernel = None if taps is None else nn.Parameter(taps)
        self.conv_bias = None if taps is None else nn.Parameter(torch.empty(2 * width))
        self.rate_proj = nn.Linear(hidden, self.heads)
        # Beside 1 / t, for every place in a mini-batch.
        self.place_rates = nn.Parameter(torch.empty(self.length))
        self.initial_weight = nn.Parameter(torch.empty(self.heads, self.size, self.size))
        self.initial_bias = nn.Parameter(torch.empty(self.heads, 1, self.size))
        self.norm_weight = nn.Parameter(torch.empty(self.heads, 1, self.size))
        self.norm_bias = nn.Parameter(torch.empty(self.heads, 1, self.size))
        self.o_norm = nn.LayerNorm(width, eps=EPSILON)
        self.g_proj = nn.Linear(hidden, width, bias=False) if config.gated else None
        self.o_proj = nn.Linear(width, hidden, bias=False)

    @classmethod
    def resolve(cls, config: TTTLinearConfig, dims: Dims) -> TTTLinearConfig:
        return config.resolved(dims)

    def reset_parameters(self, embedding_std: float) -> None:
        config = self.config
        for linear in (self.qk_proj, self.v_proj, self.g_proj):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if self.kernel is not None and self.conv_bias is not None:
            start_convolution(self.kernel, config.conv_std)
            nn.init.zeros_(self.conv_bias)
        nn.init.normal_(self.rate_proj.weight, std=WEIGHT_STD)
        start = torch.logit(torch.tensor(config.initial_rate))
        nn.init.constant_(self.rate_proj.bias, float(start))
        nn.init.normal_(self.initial_weight, std=WEIGHT_STD)
        for ones in (self.norm_weight, self.o_norm.weight):
            nn.init.ones_(ones)
        for zeros in (self.place_rates, self.initial_bias, self.norm_bias, self.o_norm.bias):
            nn.init.zeros_(zeros)
        start_output(self.o_proj.weight, config.output_std)

    def init_state(self, batch_size: int) -> TTTLinearState:
        dtype = accumulator_dtype(self.norm_bias.dtype)
        weight, bias = (w.to(dtype)[None] for w in (self.initial_weight, self.initial_bias))
        model = LinearModel(*(one.expand(batch_size, -1, -1, -1) for one in (weight, bias)))
        steps = LinearModel(torch.zeros_like(model.weight), torch.zeros_like(model.bias))
        filled = self.zeros(batch_size, dtype=torch.long)
        if self.kernel is None:
            return TTTLinearState(model, steps, filled, ())
        tail = batch_size, self.config.conv_size - 1, self.heads * self.size
        return TTTLinearState(model, steps, filled, self.zeros(*tail, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        state: TTTLinearState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, TTTLinearState]:
        answer, new = self.branch(x, state, mask)
        return inner(x) + answer, (new if write else state)

    def branch(
        self, x: Tensor, state: TTTLinearState, mask: Tensor | None
    ) -> tuple[Tensor, TTTLinearState]:
        """What the memory answers to `x` (B, T, D), and the state after it."""
        order, real = real_first_order(mask)
        x = tokens_in(order, x)
        qk, tail = self._queries_and_keys(x, state, real)
        v, rate = self.v_proj(x), self.rate_proj(x)
        with torch.autocast(x.device.type, enabled=False):
            y, new = self._learn(qk, v, rate, state, real)
            weight, bias = (w.to(y.dtype) for w in (self.o_norm.weight, self.o_norm.bias))
            y = F.layer_norm(y, weight.shape, weight, bias, EPSILON).to(x.dtype)
        if self.g_proj is not None:
            y = y * F.gelu(self.g_proj(x), approximate="tanh")
        return tokens_back_from(order, self.o_proj(y)), new._replace(tail=tail)

    def _queries_and_keys(
        self, x: Tensor, state: TTTLinearState, real: Tensor | None
    ) -> tuple[Tensor, Tensor | tuple[()]]:
        """(B, T, D) -> queries and keys (B, T, 2 H d), and the tail of their convolutions."""
        z, tail = self.qk_proj(x), state.tail
        if self.kernel is not None and self.conv_bias is not None and isinstance(tail, Tensor):
            # One projection, and two kernels that see the same inputs.
            both = torch.cat([tail, tail], dim=-1)
            z, both = short_convolution(torch.cat([z, z], dim=-1), self.kernel, both, real)
            z, tail = z + self.conv_bias, both[..., : tail.shape[-1]]
        return z, tail

    def _learn(
        self, qk: Tensor, v: Tensor, rate: Tensor, state: TTTLinearState, real: Tensor | None
    ) -> tuple[Tensor, TTTLinearState]:
        """What the model says to each token, (B, T, H d), and the state after them.

        qk (B, T, 2 H d): queries and keys; v (B, T, H d); rate (B, T, H), its logits. Real tokens first.
        """
        wide, tokens, length = state.model.weight.dtype, v.shape[1], self.length
        # As many mini-batches as the tokens reach into, wherever in one they begin.
        parts = (tokens + 2 * length - 2) // length
        begun = state.filled.unsqueeze(1)
        end = begun + (tokens if real is None else real.sum(dim=1, keepdim=True))
        place = torch.arange(parts * length, device=v.device)
        # At a place without a token stands another one, at rate zero.
        at = (place - begun).clamp(0, tokens - 1)
        qk, v, rate = (tokens_at(z.to(wide), at) for z in (qk, v, rate))
        rate = torch.sigmoid(rate) * (self.config.base_rate / self.size)
        rate = rate * ((place >= begun) & (place < end)).unsqueeze(-1)
        qk = rearrange(qk, "b (n c) (two h d) -> two n (b h) c d", two=2, n=parts, h=self.heads)
        v = rearrange(v, "b (n c) (h d) -> n (b h) c d", n=parts, h=self.heads)
        rate = rearrange(rate, "b (n c) h -> n (b h) c 1", n=parts)
        c = 1 / torch.arange(1, length + 1, device=v.device, dtype=wide)
        c = (c + self.place_rates.to(wide)).clamp(min=0).unsqueeze(-1)  # (C, 1)
        full = repeat(end > place[length - 1 :: length], "b n -> n (b h) 1 1", h=self.heads)
        norm = Norm(
            *(
                repeat(w.to(wide), "h 1 d -> (b h) 1 d", b=len(begun))
                for w in (self.norm_weight, self.norm_bias)
            )
        )
        before = state.model.joined(), state.steps.joined()
        q, k = turned(qk)
        said, *after = told_in_mini_batches(q, k, v, rate, c, full, *before, norm)
        said = rearrange(said, "n (b h) c d -> b (n c) (h d)", h=self.heads)
        y = tokens_at(said, begun + torch.arange(tokens, device=v.device))
        model, steps = (LinearModel.apart(one, self.heads) for one in after)
        return y, TTTLinearState(model, steps, end.squeeze(1) % length, ())
