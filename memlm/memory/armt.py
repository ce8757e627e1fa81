"""ARMT: an associative memory in every layer, written by memory tokens (Rodkin et al. 2024, section 2).

Memory tokens follow each segment through all layers. Each layer adds to its input what the input's
queries recall from the layer's associative matrix, and afterwards stores what the memory tokens hold,
by a delta rule over DPFP features. All memory tokens of a segment are written against the matrix the
segment was read with.

Clipping, the stop-gradient on gamma and the epsilons are the published code's, not the paper's text; so are
heads, unit features, the missing denominator and a gate per channel, from its later versions.
`initial_gate` and `value_std` choose the initialisation; their defaults are the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
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
from memlm.memory.parts.associative import (
    averaged,
    features_of,
    outer_products,
    summed,
    uncounted,
)
from memlm.memory.parts.checks import memory_tokens_for
from memlm.memory.parts.gates import GatedConfig, GatedMemory
from memlm.memory.parts.starts import start_output

NORMALISERS = ("all", "written", "none")


@dataclass(frozen=True, kw_only=True)
class ARMTConfig(GatedConfig):
    """Options of ARMT.

    num_memory_tokens: tokens that write, each segment; None picks 16, or half a segment.
    d_mem: size of queries and keys before the feature map. nu: DPFP order; features are 2 nu d_mem.
    num_heads: memories a layer has, each with its share of d_mem and of the hidden size, and a gate of its
    own. unit_features: queries and keys have length 1 after the feature map. vector_gate: a gate for each
    channel of the values instead of one for each head.
    correction: keep the normaliser from counting a key twice (gamma); False sets gamma to 1.
    initial_gate: bias of the write gate beta = sigmoid(w m + b) at the start. value_std: scale of the
    value projection at the start; 0 leaves the base model's logits as they were. token_std: scale of the
    memory tokens at the start; None takes the embeddings'. query_scale, key_scale: scale of W_q and W_k at
    the start, in units of 1 / sqrt(hidden size). shared_start: W_k starts as a copy of W_q, so that what is
    the same is found by the same features before anything is learnt.
    gate_limit: largest gate logit either way, reached smoothly, so that training cannot shut or open a
    gate for good; None leaves it free, as the paper does. write_gate, write_threshold, train_threshold,
    gate_noise, write_cost, open_cost: as in `GatedConfig` (not in the paper, which has a sigmoid); a
    segment that is not full pays `write_cost` by its length. normaliser: "all" counts the keys of every
    segment, as the paper's code does, "written" each key as far as its gate is open, and "none" does
    without a denominator: then nothing but the delta rule bounds what is stored, best with
    unit_features. With "all" alone a segment whose gates are zero is no exact silence. None picks
    "written" for hard gates, else "all".
    """

    num_memory_tokens: int | None = None
    d_mem: int = 64
    nu: int = 3
    num_heads: int = 1
    unit_features: bool = False
    vector_gate: bool = False
    correction: bool = True
    initial_gate: float = option(0.0)
    value_std: float = option(0.0)
    token_std: float | None = option(None)
    query_scale: float = option(1.0)
    key_scale: float = option(1.0)
    shared_start: bool = option(False)
    gate_limit: float | None = None
    normaliser: str | None = None

    @classmethod
    def paper(cls) -> Self:
        """BABILong's: 10 tokens, queries and keys of 64, DPFP-3 (segments of 512).

        From the published code, which also has what the text leaves out: gamma's clipping and
        stop-gradient, the epsilons, and the scale of W_q and W_k, that of torch's linear layers.
        """
        return cls(
            num_memory_tokens=10,
            d_mem=64,
            nu=3,
            correction=True,
            normaliser="all",
            query_scale=3**-0.5,
            key_scale=3**-0.5,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.normaliser is None:
            chosen = "written" if self.write_gate == "hard" else "all"
            object.__setattr__(self, "normaliser", chosen)


class ARMTState(NamedTuple):
    """What a layer remembers, float32 or wider; P = 2 nu d_mem features, H heads.

    associations (B, P / H, D), normaliser (B, P), or () without (both: `memlm.memory.parts.associative`);
    of the last segment, written (B,): the mean gate times its length in full segments, and opened (B,):
    the largest gate.
    """

    associations: Tensor
    normaliser: Tensor | tuple[()]
    written: Tensor
    opened: Tensor | tuple[()] = ()


class ARMT(GatedMemory):
    """Associative Recurrent Memory Transformer."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = ARMTConfig
    neutral: ClassVar[bool] = True
    silent_with: ClassVar[Mapping[str, Any]] = {"normaliser": "written"}
    continues: ClassVar[Continues] = Continues("read")
    config: ARMTConfig

    def __init__(self, config: ARMTConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_memory_tokens is not None
        self.num_memory_tokens = config.num_memory_tokens
        self.heads = config.num_heads
        self.features = partial(
            features_of, heads=config.num_heads, nu=config.nu, unit=config.unit_features
        )
        self.num_features = 2 * config.nu * config.d_mem
        self.correction = config.correction
        self.initial_gate, self.value_std = config.initial_gate, config.value_std
        self.gate_limit = config.gate_limit
        self.counts_all = config.normaliser == "all"
        self.divides = config.normaliser != "none"
        self.recall = averaged if self.divides else summed
        self.shared_start = config.shared_start
        self.query = nn.Linear(dims.hidden_size, config.d_mem, bias=False)
        self.key = nn.Linear(dims.hidden_size, config.d_mem, bias=False)
        self.value = nn.Linear(dims.hidden_size, dims.hidden_size, bias=False)
        gates = dims.hidden_size if config.vector_gate else config.num_heads
        self.gate = nn.Linear(dims.hidden_size, gates)

    @classmethod
    def resolve(cls, config: ARMTConfig, dims: Dims) -> ARMTConfig:
        for name in ("d_mem", "nu", "num_heads"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
        for size, width in (("d_mem", config.d_mem), ("hidden_size", dims.hidden_size)):
            if width % config.num_heads:
                raise ValueError(
                    f"num_heads={config.num_heads} does not divide {size}={width}; use a divisor of it"
                )
        for name in ("query_scale", "key_scale"):
            if getattr(config, name) <= 0:
                raise ValueError(f"{name}={getattr(config, name)} must be above 0")
        if config.shared_start and config.key_scale != config.query_scale:
            raise ValueError(
                f"key_scale={config.key_scale} has no meaning with shared_start=True, which copies W_q; "
                "give query_scale the same value, or leave shared_start out"
            )
        config.check_gates()
        if config.normaliser not in NORMALISERS:
            raise ValueError(
                f"normaliser={config.normaliser!r} is unknown; use {' or '.join(map(repr, NORMALISERS))}"
            )
        if config.normaliser == "none" and not config.unit_features:
            raise ValueError(
                "normaliser='none' lets what long keys store grow without end; give unit_features=True"
            )
        if config.normaliser == "none" and not config.correction:
            raise ValueError(
                "correction=False has no meaning with normaliser='none', which counts no keys; leave it out"
            )
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
        unit = self.dims.hidden_size**-0.5
        nn.init.normal_(self.query.weight, std=self.config.query_scale * unit)
        nn.init.normal_(self.key.weight, std=self.config.key_scale * unit)
        if self.shared_start and not was_loaded(self.key.weight):
            with torch.no_grad():
                self.key.weight.copy_(self.query.weight)
        nn.init.normal_(self.gate.weight, std=unit)
        nn.init.constant_(self.gate.bias, self.initial_gate)
        start_output(self.value.weight, self.value_std)

    def init_state(self, batch_size: int) -> ARMTState:
        weight = self.value.weight
        dtype = accumulator_dtype(weight.dtype)
        size = self.num_features // self.heads, self.dims.hidden_size
        none = weight.new_zeros(batch_size, self.num_features, dtype=dtype)
        return ARMTState(
            weight.new_zeros(batch_size, *size, dtype=dtype),
            none if self.divides else (),
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
        phi = self.features(self.query(x))
        return self.recall(phi, state.associations, state.normaliser).to(x.dtype)

    def write(self, memory: Tensor, state: ARMTState, share: Tensor | float = 1.0) -> ARMTState:
        """Store what memory tokens (B, M, D) hold; every token against the state that was read.

        share: the segment's length in full segments, () or (B,).
        """
        wide = state.associations.dtype
        with torch.autocast(memory.device.type, enabled=False):
            tokens = memory.to(self.key.weight.dtype)
            phi = self.features(self.key(tokens)).to(wide)  # (B, M, H, P / H)
            value = self.value(tokens).to(wide)  # (B, M, D)
            beta = self._beta(tokens, wide)  # (B, M, H), or (B, M, D) by channel
            missing = value - self.recall(phi, state.associations, state.normaliser)
            gates = beta.unflatten(2, (self.heads, -1))  # (B, M, H, 1 or D / H)
            gated = (gates * missing.unflatten(2, (self.heads, -1))).flatten(2)
            written = share * beta.mean(dim=(1, 2))
            return ARMTState(
                state.associations + outer_products(phi, gated),
                self._count(phi, gates, state.normaliser),
                written.to(wide),
                beta.amax(dim=(1, 2)),
            )

    def _beta(self, tokens: Tensor, wide: torch.dtype) -> Tensor:
        logit = self.gate(tokens).to(wide)
        if self.gate_limit is not None:
            logit = self.gate_limit * torch.tanh(logit / self.gate_limit)
        return self.gates_at(logit)

    def _count(
        self, phi: Tensor, gates: Tensor, normaliser: Tensor | tuple[()]
    ) -> Tensor | tuple[()]:
        """The normaliser with the keys (B, M, H, p) counted, each as far as it was not yet (gamma)."""
        if isinstance(normaliser, tuple):
            return normaliser
        gamma = uncounted(phi, normaliser) if self.correction else torch.ones_like(phi[..., 0])
        if not self.counts_all:
            # A key counts if any channel is written under it.
            gamma = gamma * gates.amax(dim=-1)
        return normaliser + (gamma.unsqueeze(-1) * phi).sum(dim=1).flatten(1)
