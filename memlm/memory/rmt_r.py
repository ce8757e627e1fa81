"""RMT-R: RMT that recalls its own past memory states (Kuratov et al. 2024, arXiv:2402.10790).

Each segment's memory M' joins a bank of past states. Before the next segment the memory asks the bank by
one head of cross-attention, an MLP follows, and what comes out, R, is read beside the memory: the decoder
sees [M; R; x; M], or [R; x; M], and its last hidden states at the trailing copy are the next memory.

Norms, skips, the MLP, and the vectors read while nothing is past follow the authors' published code
(language_modeling_mem_retrieve.py). It keeps every state; here the bank has `bank_size` places, and beyond
it an optional archive, out of which the best few are picked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memlm.memory.base import (
    Continues,
    Dims,
    Inner,
    Memory,
    MemoryConfig,
    Site,
    live_option,
    option,
    was_loaded,
)
from memlm.memory.parts.cache import held
from memlm.memory.parts.checks import memory_tokens_for
from memlm.memory.parts.memory_tokens import around, check_decoder_memory

EPSILON = 1e-5  # of the norms
WIDENING = 4  # of the MLP
# What the attention's logits are multiplied with; the code's top-1 is a softmax that is all but hard.
SHARPNESS = {"softmax": 1.0, "top-1": 1e5}


@dataclass(frozen=True, kw_only=True)
class RMTRConfig(MemoryConfig):
    """Options of RMT-R.

    num_memory_tokens: vectors carried from segment to segment, and recalled; None picks 16, or half a
    segment. bank_size: past states that are attended, the last ones; gradients flow into them. The
    default is the number of segments the paper trains with. archive_size: older states kept beyond the
    bank, without gradient; 0 forgets them. recall: how many of these are attended together with the bank.
    attention: "softmax" over the past vectors, or "top-1", the best one alone for each of the memory's.
    read_memory: whether tokens see the memory itself beside what it recalls. biases: of the attention's
    projections. dropout: in training, of the softmax, and of what attention and MLP give.
    """

    num_memory_tokens: int | None = None
    bank_size: int = 32
    archive_size: int = 0
    recall: int = option(4)
    attention: str = option("softmax")
    read_memory: bool = option(True)
    biases: bool = option(False)
    dropout: float = live_option(0.0)

    @classmethod
    def paper(cls) -> Self:
        """16 tokens, and as many recalled from 32 segments, those of its training; biases and dropout.

        The last two are the published code's. It keeps every state, and starts O and the MLP random; here
        they are zero.
        """
        return cls(
            num_memory_tokens=16,
            bank_size=32,
            archive_size=0,
            attention="softmax",
            biases=True,
            dropout=0.1,
        )


class RMTRState(NamedTuple):
    """What a row remembers; N = bank_size, A = archive_size.

    memory (B, M, D): what the next segment reads. bank (B, N, M, D): the last states, memory included,
    right-aligned, oldest first; archive (B, A, M, D): those before them, in the same way.
    length (B,): how many states the two hold; the bank fills first.
    """

    memory: Tensor
    bank: Tensor
    archive: Tensor
    length: Tensor


class RMTR(Memory):
    """Recurrent Memory Transformer with recall of its own past."""

    site: ClassVar[Site] = "model"
    Config: ClassVar[type[MemoryConfig]] = RMTRConfig
    accumulates: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("front")
    config: RMTRConfig

    def __init__(self, config: RMTRConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_memory_tokens is not None
        self.num_memory_tokens = config.num_memory_tokens
        self.bank_size, self.archive_size = config.bank_size, config.archive_size
        self.picked = config.recall
        self.scale = SHARPNESS[config.attention] * dims.hidden_size**-0.5
        # The code drops no weight of the hard attention.
        self.drops_weights = config.attention == "softmax"
        size = dims.hidden_size
        self.initial_memory = nn.Parameter(torch.empty(config.num_memory_tokens, size))
        self.initial_recall = nn.Parameter(torch.empty(config.num_memory_tokens, size))
        self.query_norm, self.past_norm, self.mlp_norm = (
            nn.LayerNorm(size, eps=EPSILON) for _ in range(3)
        )
        self.query, self.key, self.value, self.output = (
            nn.Linear(size, size, bias=config.biases) for _ in range(4)
        )
        self.mlp_in = nn.Linear(size, WIDENING * size)
        self.mlp_out = nn.Linear(WIDENING * size, size)

    @classmethod
    def resolve(cls, config: RMTRConfig, dims: Dims) -> RMTRConfig:
        check_decoder_memory("rmt-r", config, dims)
        if config.bank_size < 1:
            raise ValueError(
                f"bank_size={config.bank_size} leaves nothing to recall; give at least 1, or memory='rmt'"
            )
        if config.archive_size < 0:
            raise ValueError(f"archive_size={config.archive_size} must be 0 states or more")
        if config.recall < 1:
            raise ValueError(
                f"recall={config.recall} must be at least 1; archive_size=0 keeps no archive"
            )
        if 0 < config.archive_size < config.recall:
            raise ValueError(
                f"recall={config.recall} states are more than archive_size={config.archive_size} holds; "
                "use a smaller recall or a larger archive_size"
            )
        if config.attention not in SHARPNESS:
            raise ValueError(
                f"attention={config.attention!r} is unknown; use {' or '.join(map(repr, SHARPNESS))}"
            )
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout={config.dropout} must be from 0 to below 1")
        return replace(config, num_memory_tokens=memory_tokens_for(config.num_memory_tokens, dims))

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return (3 if config.read_memory else 2) * config.num_memory_tokens

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.normal_(self.initial_memory, std=embedding_std)
        if not was_loaded(self.initial_recall):
            with torch.no_grad():
                self.initial_recall.copy_(self.initial_memory)
        for norm in (self.query_norm, self.past_norm, self.mlp_norm):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        for linear in (self.query, self.key, self.value, self.mlp_in):
            nn.init.normal_(linear.weight, std=self.dims.hidden_size**-0.5)
        for linear in (self.query, self.key, self.value, self.output):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        # So that at the start it is RMT, which reads its memory twice.
        for zero in (self.output.weight, self.mlp_in.bias, self.mlp_out.weight, self.mlp_out.bias):
            nn.init.zeros_(zero)

    def init_state(self, batch_size: int) -> RMTRState:
        shape = (self.num_memory_tokens, self.dims.hidden_size)
        return RMTRState(
            self.rows_of(self.initial_memory, batch_size),
            self.zeros(batch_size, self.bank_size, *shape),
            self.zeros(batch_size, self.archive_size, *shape),
            self.zeros(batch_size, dtype=torch.long),
        )

    def forward(
        self, x: Tensor, state: RMTRState, inner: Inner, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, RMTRState]:
        memory = state.memory.to(x.dtype)
        recalled = self.read(state).to(x.dtype)
        before = torch.cat([memory, recalled], dim=1) if self.config.read_memory else recalled
        y, new = around(before, x, memory if write else None, inner, mask)
        return y, self.write(new, state) if write else state

    def read(self, state: RMTRState) -> Tensor:
        """R (B, M, D): what the memory recalls of the past, and a learned R while there is none."""
        memory = state.memory.to(self.query.weight.dtype)
        past, real = self._past(memory, state)
        normed = self.past_norm(past)
        # A softmax over nothing is NaN: an empty past is attended, and its answer thrown away.
        seen = real | ~real.any(dim=1, keepdim=True)
        found = F.scaled_dot_product_attention(
            self.query(self.query_norm(memory)),
            self.key(normed),
            self.value(normed),
            attn_mask=seen.unsqueeze(1),
            dropout_p=self.config.dropout if self.training and self.drops_weights else 0.0,
            scale=self.scale,
        )
        recalled = memory + self._dropped(self.output(found))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(recalled)))
        recalled = recalled + self._dropped(self.mlp_out(hidden))
        first = (state.length == 0)[:, None, None]
        return torch.where(first, self.initial_recall.to(recalled.dtype), recalled)

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def write(self, memory: Tensor, state: RMTRState) -> RMTRState:
        """`memory` (B, M, D) joins the bank; the bank's oldest moves to the archive, whose oldest goes."""
        fresh = memory.to(state.bank.dtype).unsqueeze(1)
        bank = torch.cat([state.bank, fresh], dim=1)
        archive = torch.cat([state.archive, bank[:, :1].detach()], dim=1)
        length = (state.length + 1).clamp(max=self.bank_size + self.archive_size)
        return RMTRState(memory, bank[:, 1:], archive[:, 1:], length)

    def _past(self, memory: Tensor, state: RMTRState) -> tuple[Tensor, Tensor]:
        """The vectors to attend to (B, S, D), and which of them are real (B, S)."""
        states = state.bank
        real = held(state.length.clamp(max=self.bank_size), self.bank_size)
        if self.archive_size:
            index, found = self.pick(memory, state)
            rows = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
            states = torch.cat([state.archive[rows, index], states], dim=1)
            real = torch.cat([found, real], dim=1)
        past = states.flatten(1, 2).to(memory.dtype)
        return past, real.repeat_interleave(self.num_memory_tokens, dim=1)

    @torch.no_grad()
    def pick(self, memory: Tensor, state: RMTRState) -> tuple[Tensor, Tensor]:
        """The archived states (B, recall) that `memory` (B, M, D) looks for, and which of them are real.

        Those with the largest inner product between mean query and mean key: the largest mean logit of
        the attention that follows, and what a flat FAISS index over the mean keys would find.
        """
        filled = held((state.length - self.bank_size).clamp(min=0), self.archive_size)
        query = self.mean_query(memory).unsqueeze(2)
        scores = (self.mean_keys(state.archive) @ query).squeeze(2)
        index = scores.masked_fill(~filled, -torch.inf).topk(self.picked, dim=1).indices
        return index, filled.gather(1, index)

    def mean_query(self, memory: Tensor) -> Tensor:
        """(B, M, D) -> (B, D): the mean of the memory's queries."""
        return self.query(self.query_norm(memory).mean(dim=1))

    def mean_keys(self, states: Tensor) -> Tensor:
        """(B, A, M, D) -> (B, A, D): each state's mean key, its norm taken vector by vector."""
        normed = self.past_norm(states.to(self.key.weight.dtype))
        return self.key(normed.mean(dim=2))
