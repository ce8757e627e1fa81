"""ARMT: an associative memory in every layer, written by memory tokens (Rodkin et al. 2024, section 2).

Memory tokens follow each segment through all layers. Each layer adds to its input what the input's
queries recall from the layer's associative matrix, and afterwards stores what the memory tokens hold,
by a delta rule over DPFP features. All memory tokens of a segment are written against the matrix the
segment was read with.

Clipping, the stop-gradient on gamma and the epsilons are the published code's, not the paper's text.
`initial_gate` and `value_std` choose the initialisation; their defaults are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from memlm.memory.base import (
    Dims,
    Inner,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
    was_loaded,
)
from memlm.memory.parts.checks import memory_tokens_for
from memlm.memory.parts.feature_maps import dpfp
from memlm.memory.parts.gates import GatedConfig, GatedMemory

EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class ARMTConfig(GatedConfig):
    """Options of ARMT.

    num_memory_tokens: tokens that write, each segment; None picks 16, or half a segment.
    d_mem: size of queries and keys before the feature map. nu: DPFP order; features are 2 nu d_mem.
    correction: keep the normaliser from counting a key twice (gamma); False sets gamma to 1.
    initial_gate: bias of the write gate beta = sigmoid(w m + b) at the start. value_std: scale of the
    value projection at the start; 0 leaves the base model's logits as they were. token_std: scale of the
    memory tokens at the start; None takes the embeddings'. shared_start: W_k starts as a copy of W_q, so
    that what is the same is found by the same features before anything is learnt.
    gate_limit: largest gate logit either way, reached smoothly, so that training cannot shut or open a
    gate for good; None leaves it free, as the paper does. write_gate, write_threshold, train_threshold,
    gate_noise, write_cost: as in `GatedConfig` (not in the paper, which has a sigmoid); a segment that is
    not full pays by its length. normaliser: "all" counts the keys of every segment, as the paper's code
    does, "written" each key as far as its gate is open; only then is a segment whose gates are zero exact
    silence. None picks "written" for hard gates.
    """

    num_memory_tokens: int | None = None
    d_mem: int = 64
    nu: int = 3
    correction: bool = True
    initial_gate: float = option(0.0)
    value_std: float = option(0.0)
    token_std: float | None = option(None)
    shared_start: bool = option(False)
    gate_limit: float | None = None
    normaliser: str | None = None

    @classmethod
    def paper(cls) -> Self:
        """BABILong's: 10 tokens, queries and keys of 64, DPFP-3 (segments of 512).

        From the published code, which also has what the text leaves out: gamma's clipping and
        stop-gradient, and the epsilons.
        """
        return cls(num_memory_tokens=10, d_mem=64, nu=3, correction=True, normaliser="all")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normaliser is None:
            chosen = "written" if self.write_gate == "hard" else "all"
            object.__setattr__(self, "normaliser", chosen)


class ARMTState(NamedTuple):
    """What a layer remembers, float32 or wider; P = 2 nu d_mem features.

    associations (B, P, D), normaliser (B, P); of the last segment, written (B,): the mean gate times its
    length in full segments, and opened (B,): the largest gate.
    """

    associations: Tensor
    normaliser: Tensor
    written: Tensor
    opened: Tensor | tuple[()] = ()


class ARMT(GatedMemory):
    """Associative Recurrent Memory Transformer."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = ARMTConfig
    neutral: ClassVar[bool] = True
    silent_with: ClassVar[Mapping[str, Any]] = {"normaliser": "written"}

    def __init__(self, config: ARMTConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_memory_tokens is not None
        self.num_memory_tokens = config.num_memory_tokens
        self.nu = config.nu
        self.correction = config.correction
        self.initial_gate, self.value_std = config.initial_gate, config.value_std
        self.gate_limit = config.gate_limit
        self.counts_all = config.normaliser == "all"
        self.shared_start = config.shared_start
        self.query = nn.Linear(dims.hidden_size, config.d_mem, bias=False)
        self.key = nn.Linear(dims.hidden_size, config.d_mem, bias=False)
        self.value = nn.Linear(dims.hidden_size, dims.hidden_size, bias=False)
        self.gate = nn.Linear(dims.hidden_size, 1)

    @classmethod
    def resolve(cls, config: ARMTConfig, dims: Dims) -> ARMTConfig:
        for name in ("d_mem", "nu"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
        config.check_gates()
        if config.normaliser not in ("all", "written"):
            raise ValueError(f"normaliser={config.normaliser!r} is unknown; use 'all' or 'written'")
        if config.gate_limit is not None and config.gate_limit <= 0:
            raise ValueError(f"gate_limit={config.gate_limit} must be above 0, or None")
        return replace(config, num_memory_tokens=memory_tokens_for(config.num_memory_tokens, dims))

    @classmethod
    def num_segment_tokens(cls, config: Any) -> int:
        return config.num_memory_tokens

    @classmethod
    def segment_token_std(cls, config: Any, embedding_std: float) -> float:
        return embedding_std if config.token_std is None else config.token_std

    def reset_parameters(self, embedding_std: float) -> None:
        for projection in (self.query, self.key):
            nn.init.normal_(projection.weight, std=self.dims.hidden_size**-0.5)
        if self.shared_start and not was_loaded(self.key.weight):
            with torch.no_grad():
                self.key.weight.copy_(self.query.weight)
        nn.init.normal_(self.gate.weight, std=self.dims.hidden_size**-0.5)
        nn.init.constant_(self.gate.bias, self.initial_gate)
        if self.value_std == 0:
            nn.init.zeros_(self.value.weight)
        else:
            nn.init.normal_(self.value.weight, std=self.value_std)

    def init_state(self, batch_size: int) -> ARMTState:
        weight = self.value.weight
        dtype = accumulator_dtype(weight.dtype)
        features = 2 * self.nu * self.key.out_features
        return ARMTState(
            weight.new_zeros(batch_size, features, self.dims.hidden_size, dtype=dtype),
            weight.new_zeros(batch_size, features, dtype=dtype),
            weight.new_zeros(batch_size, dtype=dtype),
            weight.new_zeros(batch_size, dtype=dtype),
        )

    def forward(
        self, x: Tensor, state: ARMTState, inner: Inner, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, ARMTState]:
        y = inner(x + self.read(x, state))
        if not write:
            return y, state
        m = self.num_memory_tokens
        length = x.shape[1] - m if mask is None else mask[:, :-m].sum(dim=1).to(state.written.dtype)
        return y, self.write(y[:, -m:], state, length / self.dims.segment_length)

    def read(self, x: Tensor, state: ARMTState) -> Tensor:
        """What the queries of `x` (B, T, D) recall: A^T phi(q) / (z . phi(q) + eps), (B, T, D)."""
        phi = dpfp(self.query(x), self.nu)
        return recall(phi, state).to(x.dtype)

    def write(self, memory: Tensor, state: ARMTState, share: Tensor | float = 1.0) -> ARMTState:
        """Store what memory tokens (B, M, D) hold; every token against the state that was read.

        share: the segment's length in full segments, () or (B,).
        """
        wide = state.associations.dtype
        with torch.autocast(memory.device.type, enabled=False):
            tokens = memory.to(self.key.weight.dtype)
            phi = dpfp(self.key(tokens), self.nu).to(wide)  # (B, M, P)
            value = self.value(tokens).to(wide)  # (B, M, D)
            beta = self._beta(tokens, wide)  # (B, M, 1)
            counted = torch.einsum("bmp,bp->bm", phi, state.normaliser) + EPSILON
            stored = torch.einsum("bmp,bpd->bmd", phi, state.associations) / counted.unsqueeze(-1)
            associations = state.associations + phi.mT @ (beta * (value - stored))
            gamma = self._gamma(phi, counted, state.normaliser).unsqueeze(-1)
            if not self.counts_all:
                gamma = gamma * beta
            written = share * beta.mean(dim=(1, 2))
            return ARMTState(
                associations,
                state.normaliser + (gamma * phi).sum(dim=1),
                written.to(wide),
                beta.detach().amax(dim=(1, 2)),
            )

    def _beta(self, tokens: Tensor, wide: torch.dtype) -> Tensor:
        logit = self.gate(tokens).to(wide)
        if self.gate_limit is not None:
            logit = self.gate_limit * torch.tanh(logit / self.gate_limit)
        return self.gates_at(logit)

    def _gamma(self, phi: Tensor, counted: Tensor, normaliser: Tensor) -> Tensor:
        """How much of each key the normaliser does not count yet, (B, M); carries no gradient."""
        if not self.correction:
            return torch.ones_like(counted)
        with torch.no_grad():
            missing = 1 - counted / (phi.square().sum(dim=-1) + EPSILON)
            # An empty normaliser counts nothing, so that a first segment is written whole.
            empty = (normaliser == 0).all(dim=-1, keepdim=True)
            return torch.where(empty, 1.0, missing.clamp(0, 1))


def recall(phi: Tensor, state: ARMTState) -> Tensor:
    """Normalised read-out of features (B, T, P), computed in the features' dtype.

    The quotient alone is wide: in bfloat16 a sum over P features would lose the epsilon.
    """
    with torch.autocast(phi.device.type, enabled=False):
        wide = phi.to(state.normaliser.dtype)
        counted = torch.einsum("btp,bp->bt", wide, state.normaliser).unsqueeze(-1)
        return (phi @ state.associations.to(phi.dtype)) / (counted + EPSILON)
