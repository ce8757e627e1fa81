"""kNN memory: each query attends to the stored keys nearest to it (Wu et al. 2022; Klett, Ahle 2024).

A layer stores the keys and values of the tokens before the segment, exact, without position and without
gradient: what is written is detached. Each query of each head searches the whole store for its `top_k`
nearest keys, and what it reads there is mixed with the attention over the segment, by the weight w:

- "gate" (Memorizing Transformers, arXiv:2203.08913, section 3.2): softmax over the retrieved keys alone,
  and w = sigmoid(g), learned, one per head. The memory's scores carry no position, as in the paper.
- "joint" (Extended Mind Transformers, arXiv:2406.02332): one softmax over retrieved and local keys, with
  the base model's own scores; nothing to train. It is the same mix with w = sigmoid(lse_m - lse_l), the
  log-sum-exps of the two parts' scores. Retrieved keys all stand at the place of the segment's first
  token, as in the authors' code for Llama.

With `chunk_length` above 1 the store is searched as in LongMem (Wang et al. 2023, arXiv:2306.07174): by the
mean keys of chunks of that many tokens, of which all tokens are then read.

The search is exact and costs T N products per head, done so many queries at a time that memory stays
bounded. A query that finds nothing keeps the base model's attention untouched.
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
    QKV,
    Continues,
    Dims,
    InnerHeads,
    Memory,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
)
from memlm.memory.parts.cache import block_means, held, push, push_blocks
from memlm.memory.parts.checks import check_known, check_least
from memlm.memory.parts.nearest import nearest, queries_at_once
from memlm.memory.parts.retrieved import attend, entries_of, mixed, read_in_parts, share

SIMILARITIES = ("cosine", "dot")
COMBINATIONS = ("gate", "joint")


@dataclass(frozen=True, kw_only=True)
class KNNConfig(MemoryConfig):
    """Options of the kNN memory.

    capacity: tokens a layer stores, the oldest leaving first. top_k: keys each query retrieves at most.
    chunk_length: tokens that are found and leave together, found by the mean of their keys.
    similarity: what is near, "cosine" (as both papers) or "dot". combine: "gate" or "joint".
    min_similarity: keys less similar are not retrieved; None: no limit. initial_gate: the gate's logit at
    the start. layers: None picks one at three quarters of the depth with "gate" (the paper's 9th of 12),
    and all with "joint".
    """

    capacity: int = 8192
    top_k: int = option(32)
    similarity: str = "cosine"
    combine: str = "gate"
    min_similarity: float | None = option(None)
    initial_gate: float = option(0.0)
    chunk_length: int = 1

    @classmethod
    def paper(cls) -> Self:
        """Memorizing Transformers: 32 of 8192 tokens, by cosine, in one layer, mixed by a gate.

        These are the defaults. Where the gate starts is not known. Extended Mind has top_k=10,
        combine="joint", min_similarity=0.25; LongMem capacity=65536, top_k=64, chunk_length=4,
        similarity="dot".
        """
        return cls(capacity=8192, top_k=32, similarity="cosine", combine="gate")


class KNNState(NamedTuple):
    """keys and values (B, G, N, dh), right-aligned, in chunks left-aligned; length (B,): how many of the N
    places are filled."""

    keys: Tensor
    values: Tensor
    length: Tensor


class KNN(Memory):
    """Attention to the nearest of many stored keys."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = KNNConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    differentiable: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("read")

    def __init__(self, config: KNNConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.capacity = config.capacity
        self.top_k = min(config.top_k, config.capacity)
        self.chunk = config.chunk_length
        self.cosine = config.similarity == "cosine"
        self.joint = config.combine == "joint"
        self.min_similarity = config.min_similarity
        self.initial_gate = config.initial_gate
        self.gate, self.log_scale = (
            nn.Parameter(torch.empty(dims.num_heads)) if needed else None
            for needed in (not self.joint, not self.joint and self.cosine)
        )

    @classmethod
    def resolve(cls, config: KNNConfig, dims: Dims) -> KNNConfig:
        check_least(config, {"chunk_length": 1})
        for name in ("capacity", "top_k"):
            if getattr(config, name) < 1:
                raise ValueError(
                    f"{name}={getattr(config, name)} is no memory; give at least 1, or memory='none'"
                )
            if getattr(config, name) % config.chunk_length:
                raise ValueError(
                    f"{name}={getattr(config, name)} is no multiple of chunk_length={config.chunk_length}; "
                    "whole chunks are stored and found"
                )
        check_known(config, {"similarity": SIMILARITIES, "combine": COMBINATIONS})
        least = config.min_similarity
        if config.similarity == "cosine" and least is not None and not -1 <= least <= 1:
            raise ValueError(
                f"min_similarity={least} is no cosine; use -1 to 1, None for no limit, or "
                "similarity='dot'"
            )
        if config.layers is None and config.combine == "gate":
            return replace(config, layers=((3 * dims.num_layers + 3) // 4 - 1,))
        return config

    @classmethod
    def num_inserted(cls, config: KNNConfig, dims: Dims) -> int:
        # With the gate, the stage runs on the segment as it is.
        return config.top_k if config.combine == "joint" else 0

    def reset_parameters(self, embedding_std: float) -> None:
        if self.gate is not None:
            nn.init.constant_(self.gate, self.initial_gate)
        if self.log_scale is not None:
            # The score q . k / sqrt(dh) of queries and keys whose entries have size 1.
            nn.init.constant_(self.log_scale, 0.5 * math.log(self.dims.head_dim))

    @property
    def joins_softmax(self) -> bool:  # type: ignore[override]
        return self.joint

    def init_state(self, batch_size: int) -> KNNState:
        shape = (batch_size, self.dims.num_kv_heads, self.capacity, self.dims.head_dim)
        return KNNState(
            self.zeros(*shape), self.zeros(*shape), self.zeros(batch_size, dtype=torch.long)
        )

    def forward(
        self, x: QKV, state: KNNState, inner: InnerHeads, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, KNNState]:
        if self.joint:
            # Without the scores, which would be held while the store is searched.
            local, local_lse, query = inner(x, parts=True)[:3]
            found, lse = self.read(x.q, state, query)
            weight = share(lse, local_lse)
        else:
            assert self.gate is not None
            local = inner(x)
            found, lse = self.read(x.q, state)
            weight = rearrange(torch.sigmoid(self.gate), "H -> H 1").to(found.dtype)
        y = mixed(weight, found, lse, local)
        return (y, self.write(x.k, x.v, state, mask)) if write else (y, state)

    def write(self, k: Tensor, v: Tensor, state: KNNState, mask: Tensor | None) -> KNNState:
        """Store the keys and values (B, G, T, dh) of a segment's real tokens, without their graph."""
        stored = (state.keys, state.values), state.length, (k.detach(), v.detach()), mask
        (keys, values), length = (
            push(*stored) if self.chunk == 1 else push_blocks(*stored, self.chunk)
        )
        return KNNState(keys, values, length)

    def read(
        self, q: Tensor, state: KNNState, query: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What each query (B, H, T, dh) finds: a softmax over its retrieved keys, float32 or wider.

        query: the queries that weigh what is found, when they are not those that search. Returns
        (B, H, T, dh) and the log-sum-exp (B, H, T) of the scores, the least number where nothing is
        found.
        """
        (batch, groups, places), wide = state.keys.shape[:3], accumulator_dtype(state.keys.dtype)
        with torch.autocast(q.device.type, enabled=False):
            keys = F.normalize(state.keys, dim=-1) if self.cosine else state.keys
            # The cosine needs one set of keys, and the joint softmax the keys as they are.
            weighed = state.keys if query is not None else keys
            # Rows are picked from one list of all entries: many times as fast as gathering.
            entries = [rearrange(t, "B G N dh -> (B G N) dh") for t in (weighed, state.values)]
            first = torch.arange(batch * groups, device=q.device)
            first = rearrange(first, "(B G) -> B G 1 1", G=groups) * places
            searched, there = self._searched(state, keys)
            count = self.top_k // self.chunk

            def read(search: Tensor, weigh: Tensor) -> tuple[Tensor, Tensor]:
                index, real = nearest(search, searched, there, count, self.min_similarity)
                if self.chunk > 1:
                    index, inside = entries_of(index, self.chunk, state.length)
                    index, real = (t.flatten(3) for t in (index, real.unsqueeze(-1) & inside))
                return attend(index + first, real, weigh, *entries)

            queries = self._queries(q, query, wide)
            return read_in_parts(read, queries, groups, queries_at_once(searched))

    def _searched(self, state: KNNState, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What queries are compared with, (B, G, n, dh), and where something is (B, n): keys, or means."""
        if self.chunk == 1:
            return keys, held(state.length, keys.shape[2])
        wide = accumulator_dtype(keys.dtype)
        means, count = block_means(state.keys, state.length, self.chunk, wide)
        return (F.normalize(means, dim=-1) if self.cosine else means), count > 0

    def _queries(self, q: Tensor, query: Tensor | None, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Queries that search, and queries whose products with keys are the scores to weigh by."""
        q = q.to(wide)
        search = F.normalize(q, dim=-1) if self.cosine else q
        if query is not None:
            return search, query.to(wide)
        if self.log_scale is None:
            return search, q * q.shape[-1] ** -0.5
        return search, search * rearrange(self.log_scale.to(wide).exp(), "H -> H 1 1")
