"""Block-Recurrent Transformers: state vectors that attend to each segment, and that its tokens attend to
(Hutchins et al. 2022).

A layer has N state vectors. The tokens of a segment see those that earlier segments left, by queries and
heads of their own beside the layer's attention. The states see each other and the segment's tokens, both
without positions, and go over to what they have seen through a gate: with the paper's best one, "fixed", a
learned share of each channel stays at every segment, whatever the segment says.

The tokens' heads end in an output projection of zeros, so that a base model is left as it was.

Letters: N states, H heads of the memory, d their size.
"""

from __future__ import annotations

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
    Memory,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
    was_loaded,
)
from memlm.memory.parts.checks import check_least, head_sizes
from memlm.memory.parts.starts import start_output

GATES = ("fixed", "lstm")
# Of norms and of the scales at the start, as in the authors' code.
EPSILON = 1e-6
STATE_STD, ID_STD, BIAS_STD = 0.1, 1.0, 0.1
# The LSTM's gates are asked to keep, and not to write, before anything is learned.
KEEP, ENTER = 1.0, -1.0


@dataclass(frozen=True, kw_only=True)
class BlockRecurrentConfig(MemoryConfig):
    """Options of the Block-Recurrent Transformer.

    num_states: state vectors of a layer, None for as many as a segment has tokens, 512 at most. num_heads:
    heads of the memory, None for the base's; head_dim: their size, None for hidden size / heads. gate:
    "fixed", s <- g s + (1 - g) z with g = sigmoid(b) learned for each channel, or "lstm", s <- f s + i z
    with gates that depend on what a state has seen. initial_gate: mean of b at the start, the logit of the
    share of a state that stays at each segment; with "lstm" it is added to the logit of f and taken from
    that of i. initial_scale: what the products of unit queries and keys are multiplied by at the start; the
    paper's 1 makes every attention nearly a mean. output_std: scale of the output projection at the start;
    0 leaves the stage as it was.
    """

    num_states: int | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    gate: str = "fixed"
    initial_gate: float = option(0.0)
    initial_scale: float = option(1.0)
    output_std: float = option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """512 states and fixed gates at their authors' start.

        The paper's segments have 512 tokens, and the states stand in one layer: the tenth of twelve, or the
        tenth and twentieth of 24.
        """
        return cls(num_states=512)

    def resolved(self, dims: Dims) -> Self:
        """Fill what is open from `dims`; ValueError for what cannot be."""
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} is unknown; use {' or '.join(map(repr, GATES))}")
        heads, size = head_sizes(self.num_heads, self.head_dim, dims)
        states = self.num_states
        filled = replace(
            self,
            num_states=min(512, dims.segment_length) if states is None else states,
            num_heads=heads,
            head_dim=size,
        )
        check_least(filled, {"num_states": 1, "head_dim": 1, "output_std": 0})
        if not self.initial_scale > 0:
            raise ValueError(f"initial_scale={self.initial_scale} must be above 0")
        return filled


class BlockRecurrentState(NamedTuple):
    """vectors (B, N, D), float32 or wider."""

    vectors: Tensor


class BlockRecurrent(Memory):
    """State vectors beside a layer's attention."""

    site: ClassVar[Site] = "attention"
    Config: ClassVar[type[MemoryConfig]] = BlockRecurrentConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("read")
    config: BlockRecurrentConfig

    def __init__(self, config: BlockRecurrentConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_states and config.num_heads and config.head_dim
        self.heads = config.num_heads
        hidden, width = dims.hidden_size, config.num_heads * config.head_dim
        self.initial = nn.Parameter(torch.empty(config.num_states, hidden))
        # What tells states apart that have come to hold the same.
        self.ids = nn.Parameter(torch.empty(config.num_states, hidden))
        self.norm = nn.Parameter(torch.empty(hidden))
        # Of tokens that see states, states that see states, and states that see tokens.
        self.scales = nn.Parameter(torch.empty(3, self.heads))
        self.token_query = nn.Linear(hidden, width, bias=False)
        self.token_entry = nn.Linear(hidden, 2 * width, bias=False)
        self.state_entry = nn.Linear(hidden, 2 * width, bias=False)
        self.state_query = nn.Linear(hidden, 2 * width, bias=False)
        self.candidate = nn.Linear(2 * width, hidden, bias=False)
        lstm = config.gate == "lstm"
        self.gate_bias = None if lstm else nn.Parameter(torch.empty(hidden))
        self.gates = nn.Linear(2 * width, 2 * hidden) if lstm else None
        self.o_proj = nn.Linear(width, hidden, bias=False)

    @classmethod
    def resolve(cls, config: BlockRecurrentConfig, dims: Dims) -> BlockRecurrentConfig:
        return config.resolved(dims)

    def reset_parameters(self, embedding_std: float) -> None:
        config = self.config
        nn.init.normal_(self.initial, std=STATE_STD)
        nn.init.normal_(self.ids, std=ID_STD)
        nn.init.ones_(self.norm)
        nn.init.constant_(self.scales, config.initial_scale)
        linears = self.token_query, self.token_entry, self.state_entry, self.state_query
        for linear in (*linears, self.candidate):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if self.gate_bias is not None:
            nn.init.normal_(self.gate_bias, config.initial_gate, BIAS_STD)
        if self.gates is not None:
            nn.init.normal_(self.gates.weight, std=(0.1 / self.gates.in_features) ** 0.5)
            nn.init.normal_(self.gates.bias, 0.0, BIAS_STD)
            if not was_loaded(self.gates.bias):
                with torch.no_grad():
                    keep, enter = self.gates.bias.chunk(2)
                    keep += KEEP + config.initial_gate
                    enter += ENTER - config.initial_gate
        start_output(self.o_proj.weight, config.output_std)

    def init_state(self, batch_size: int) -> BlockRecurrentState:
        dtype = accumulator_dtype(self.norm.dtype)
        return BlockRecurrentState(self.initial.to(dtype).expand(batch_size, -1, -1))

    def forward(
        self,
        x: Tensor,
        state: BlockRecurrentState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, BlockRecurrentState]:
        vectors = state.vectors
        seen = F.rms_norm(vectors, self.norm.shape, self.norm.to(vectors.dtype), EPSILON)
        seen = (seen + self.ids.to(vectors.dtype)).to(x.dtype)  # (B, N, D)
        keys, values = self._split(self.state_entry(seen))
        keys = unit(keys)
        y = inner(x) + self.read(x, keys, values)
        if not write:
            return y, state
        to_states, to_tokens = self._split(self.state_query(seen))
        token_keys, token_values = self._split(self.token_entry(x))
        found = torch.cat(
            [
                attend(unit(to_states), keys, values, self.scales[1]),
                attend(unit(to_tokens), unit(token_keys), token_values, self.scales[2], mask),
            ],
            dim=-1,
        )
        return y, BlockRecurrentState(self.write(found, vectors))

    def read(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What the tokens `x` (B, T, D) see of the states, keys and values (B, H, N, d): (B, T, D)."""
        q = rearrange(self.token_query(x), "b t (h d) -> b h t d", h=self.heads)
        return self.o_proj(attend(unit(q), keys, values, self.scales[0]))

    def write(self, found: Tensor, vectors: Tensor) -> Tensor:
        """`vectors` (B, N, D) after the gate; found (B, N, 2 H d): what they saw."""
        new = self.candidate(found).to(vectors.dtype)
        if self.gates is None:
            assert self.gate_bias is not None
            keep = torch.sigmoid(self.gate_bias.to(vectors.dtype))
            return keep * vectors + (1 - keep) * new
        keep, enter = torch.sigmoid(self.gates(found).to(vectors.dtype)).chunk(2, dim=-1)
        return keep * vectors + enter * new

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, 2 H d) -> twice (B, H, n, d)."""
        first, second = rearrange(z, "b n (two h d) -> two b h n d", two=2, h=self.heads)
        return first, second


def unit(x: Tensor) -> Tensor:
    """Queries or keys (..., d) of length 1, but for an epsilon beneath the root."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + EPSILON)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of every query to every key: (B, n, H d).

    q (B, H, n, d), k and v (B, H, m, d), scale (H,): its size counts. mask (B, m) bool: real keys.
    """
    scores = (q @ k.mT) * scale.abs()[:, None, None].to(q.dtype)
    if mask is not None:
        # Not minus infinity: a row without a real token keeps its state, and must have gradients.
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min)
    return rearrange(scores.softmax(dim=-1) @ v, "b h n d -> b n (h d)")
