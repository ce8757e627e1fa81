"""The neural memory that Titans and their successors share (Behrouz et al. 2024, section 3), as a block.

Tokens become queries, keys and values per head; the memory, an MLP per head and row, is trained on
keys and values while it is read (`deep_memory`), and what it answers goes back to the model's width through
a norm, a gate and a projection. What differs between MAC, MAG and MAL is where the block stands; what
differs between MAG and Yaad, Moneta, Memora or Omega is how the memory learns (`titans_config`), and every
such rule may stand at all three places.

Legend: H heads of the memory, d their size, C tokens per chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from memlm.memory.base import (
    Continues,
    Dims,
    Inner,
    Site,
    accumulator_dtype,
    was_loaded,
)
from memlm.memory.parts.deep_memory import read, read_write
from memlm.memory.parts.gates import GatedMemory
from memlm.memory.parts.memory_rules import (
    GATED,
    SILU,
    Rule,
)
from memlm.memory.parts.starts import start_convolution, start_output
from memlm.memory.parts.titans_config import (
    COMBINATIONS,
    FEATURES,
    OBJECTIVES,
    RETENTIONS,
    TitansBranchConfig,
    TitansConfig,
)
from memlm.memory.parts.tokens import (
    latest_tokens,
    real_first_order,
    short_convolution,
    tokens_back_from,
    tokens_in,
)

__all__ = [
    "COMBINATIONS",
    "Titans",
    "TitansBranch",
    "TitansBranchConfig",
    "TitansConfig",
    "TitansMemory",
    "TitansState",
]

EPSILON = 1e-6


def logit(share: float) -> Tensor:
    """What a sigmoid makes `share` of."""
    return torch.logit(torch.tensor(share))


def inverse_softplus(value: float) -> float:
    """What softplus makes `value` of, infinity included."""
    return value + math.log(-math.expm1(-value))


def coupled_step(rate: Tensor, momentum: Tensor | None) -> Tensor:
    """sigmoid(rate) (1 - eta): with momentum, whose steps sum to 1 / (1 - eta), that comes to the rate."""
    assert momentum is not None
    return torch.sigmoid(rate) * torch.sigmoid(-momentum)


def own_step(rate: Tensor, momentum: Tensor | None) -> Tensor:
    """sigmoid(rate), whatever the momentum."""
    return torch.sigmoid(rate)


class TitansState(NamedTuple):
    """weights and momentum of the memory, one (B, H, n_in, n_out) per layer, float32 or wider.

    momentum: () without it. tails: the last conv_size - 1 inputs of each convolution, (B, conv_size - 1,
    H d) each. written, opened (B,): the mean gate of the last segment over heads, and the largest; ()
    without gates. recent: keys and values (B, H, window - 1, d), rates and, with a bounded objective,
    bounds (B, H, window - 1) of the last tokens; () for a window of 1. age (B,): segments since the memory
    started again; () where it never does.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]
    tails: tuple[Tensor, ...]
    written: Tensor | tuple[()] = ()
    opened: Tensor | tuple[()] = ()
    recent: tuple[Tensor, ...] = ()
    age: Tensor | tuple[()] = ()


class TitansMemory(nn.Module):
    """The neural memory as a block: (B, T, D) and a state to (B, T, D) and the next state."""

    def __init__(self, config: TitansConfig, dims: Dims, streams: int = 3) -> None:
        super().__init__()
        assert config.num_heads and config.head_dim and config.chunk_length
        self.config = config
        self.heads, self.size, self.chunk = config.num_heads, config.head_dim, config.chunk_length
        hidden, inner = dims.hidden_size, config.num_heads * config.head_dim
        coupled = config.momentum and config.coupled_rate
        self.step = coupled_step if coupled else own_step
        self.rule = Rule(
            activation=GATED if config.gated else SILU,
            objective=OBJECTIVES[config.objective](config),
            window=config.window,
            retention=RETENTIONS[config.retention](config),
            normed=config.residual,
            muon=config.muon,
        )
        self.norm = nn.Parameter(torch.empty(hidden))
        self.query = nn.Linear(hidden, inner, bias=False)
        self.key = nn.Linear(hidden, inner, bias=False)
        self.value = nn.Linear(hidden, inner, bias=False)
        # One of each per head.
        wanted = {
            "rate": True,
            "momentum": config.momentum,
            "forgetting": True,
            "bound": self.rule.objective.bounded,
        }
        self.gate_names = tuple(name for name, there in wanted.items() if there)
        self.gates = nn.Linear(hidden, len(self.gate_names) * self.heads)
        wide = config.expansion * self.size
        count, self.features = FEATURES[config.key_features]
        widths = [count(self.size), *[wide] * (config.depth - 1), self.size]
        folds = [self.rule.activation.fold] * (config.depth - 1) + [1]
        self.initial = nn.ParameterList(
            torch.empty(self.heads, n_in, fold * n_out)
            for (n_in, n_out), fold in zip(pairwise(widths), folds, strict=True)
        )
        # How much the keys count, and how much their products.
        self.shares = nn.Parameter(torch.empty(self.heads, 2)) if self.features else None
        self.kernels = nn.ParameterList(
            torch.empty(inner, 1, config.conv_size)
            for _ in range(streams if config.conv_size else 0)
        )
        self.out_norm = nn.Parameter(torch.empty(inner))
        self.out_gate = nn.Linear(hidden, inner, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)

    def reset_parameters(self) -> None:
        """Initialise: unit features and an almost empty last layer, gates where the config says."""
        config = self.config
        nn.init.ones_(self.norm)
        nn.init.ones_(self.out_norm)
        for linear in (self.query, self.key, self.value, self.out_gate):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(self.gates.weight, std=0.1 * self.gates.in_features**-0.5)
        starts: dict[str, Any] = {
            "rate": logit(config.initial_rate / config.max_rate),
            "momentum": logit(config.initial_momentum),
            "forgetting": logit(config.initial_forgetting),
            "bound": inverse_softplus(config.initial_bound),
        }
        if not was_loaded(self.gates.bias):
            with torch.no_grad():
                parts = self.gates.bias.chunk(len(self.gate_names))
                for name, part in zip(self.gate_names, parts, strict=True):
                    part.fill_(starts[name])
        if self.shares is not None and not was_loaded(self.shares):
            with torch.no_grad():
                # One over the factorial of the degree, as in ATLAS.
                self.shares.copy_(self.shares.new_tensor([1.0, 0.5]))
        for weight in self.initial[:-1]:
            nn.init.normal_(weight, std=1.0)
        # Under a norm answers are long from the start, and a step is the larger the shorter they were.
        nn.init.normal_(self.initial[-1], std=1.0 if config.residual else 0.02)
        for kernel in self.kernels:
            start_convolution(kernel)
        start_output(self.out.weight, config.output_std)

    def init_state(self, batch_size: int) -> TitansState:
        """The learned initial weights, no momentum, nothing before the first token."""
        dtype = accumulator_dtype(self.norm.dtype)
        weights = tuple(weight.to(dtype).expand(batch_size, -1, -1, -1) for weight in self.initial)
        tail = max(0, self.config.conv_size - 1), self.out.in_features
        before = self.norm.new_zeros(batch_size, *tail, dtype=dtype)
        recent = []
        if self.rule.window > 1:
            shape = batch_size, self.heads, self.rule.window - 1
            recent = [(*shape, self.size)] * 2 + [shape] * (2 if "bound" in self.gate_names else 1)
        return TitansState(
            weights,
            tuple(torch.zeros_like(weight) for weight in weights if self.config.momentum),
            tuple(before for _ in self.kernels),
            recent=tuple(self.norm.new_zeros(shape, dtype=dtype) for shape in recent),
            age=self.norm.new_zeros(batch_size, dtype=torch.long)
            if self.config.reset_every
            else (),
        )

    def begun(self, state: TitansState) -> TitansState:
        """`state`, in its rows that start again what they start with; inputs of convolutions stay."""
        if isinstance(state.age, tuple):
            return state
        start, again = self.init_state(len(state.age)), state.age == 0

        def either(new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                torch.where(again.view(-1, *[1] * (b.ndim - 1)), a, b)
                for a, b in zip(new, old, strict=True)
            )

        return state._replace(
            weights=either(start.weights, state.weights),
            momentum=either(start.momentum, state.momentum),
            recent=either(start.recent, state.recent),
        )

    def retrieve(self, x: Tensor, state: TitansState, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the state's memory says to `x` (B, T, D), nothing written: normed (B, T, H d).

        Also the tail of the query's convolution after `x`, the last of the state's tails.
        """
        state = self.begun(state)
        order, real = real_first_order(mask)
        x = tokens_in(order, x)
        x = F.rms_norm(x, self.norm.shape, self.norm.to(x.dtype), EPSILON)
        last = len(self.kernels) - 1
        q, tail = self._project(x, self.query, last, state, real)
        with torch.autocast(x.device.type, enabled=False):
            q = F.normalize(q.to(state.weights[0].dtype), dim=-1)
            y = read(self._mapped(q), self._made_of(state.weights), self.rule)
            y = self._beside(q, y)
            return tokens_back_from(order, self._normed(y).to(x.dtype)), tail

    def forward(
        self, x: Tensor, state: TitansState, mask: Tensor | None
    ) -> tuple[Tensor, TitansState]:
        """Write `x` (B, T, D) token by token; read at each what is known there, itself included."""
        state = self.begun(state)
        order, real = real_first_order(mask)
        x = tokens_in(order, x)
        x = F.rms_norm(x, self.norm.shape, self.norm.to(x.dtype), EPSILON)
        streams = [
            self._project(x, linear, i, state, real)
            for i, linear in enumerate((self.query, self.key, self.value))
        ]
        gates = self.gates(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = state.weights[0].dtype
            q, k, v = (stream.to(wide) for stream, _ in streams)
            parts = rearrange(gates.to(wide), "B T (gate H) -> gate B H T", H=self.heads)
            gate = dict(zip(self.gate_names, parts, strict=True))
            momentum, bound = gate.get("momentum"), gate.get("bound")
            # The gradient is twice the error.
            step = self.config.max_rate / 2 * self.step(gate["rate"], momentum)
            if bound is not None:
                bound = F.softplus(bound) * self.size**0.5
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            limit = self.config.max_surprise
            # What stands beside the answer is no part of the error.
            v = v - k if self.config.residual else v
            written = [x for x in (k, v, step, bound) if x is not None]
            recent = state.recent
            y, weights, carried = read_write(
                self._mapped(q),
                self._mapped(k),
                v,
                F.logsigmoid(-gate["forgetting"]),
                None if momentum is None else F.logsigmoid(momentum),
                step,
                state.weights,
                state.momentum,
                chunk=self.chunk,
                limit=None if limit is None else limit * self.size**0.5,
                mask=real,
                rule=self.rule,
                bound=bound,
                recent=(self._mapped(recent[0]), *recent[1:]) if recent else (),
                units=self._units(len(x)),
            )
            recent = tuple(
                latest_tokens(x, before, real) for x, before in zip(written, recent, strict=False)
            )
            y = self._beside(q, self.rule.answer(y))
            read_out = self._normed(y).to(x.dtype)
        y = self.out(read_out * torch.sigmoid(self.out_gate(x)))
        tails = (*(tail for _, tail in streams), *state.tails[3:]) if self.kernels else ()
        age, every = state.age, self.config.reset_every
        if every is not None and not isinstance(age, tuple):
            age = (age + 1) % every
        new = TitansState(tuple(weights), tuple(carried), tails, recent=recent, age=age)
        return tokens_back_from(order, y), new

    def _beside(self, x: Tensor, answer: Tensor) -> Tensor:
        """What the memory says to x (B, H, T, d), from what its layers say."""
        return x + answer if self.config.residual else answer

    def _units(self, batch_size: int) -> tuple[Tensor, ...]:
        """For a retention by norms those of the first weights, (B, H) per layer."""
        retention = self.rule.retention
        if retention is None:
            return ()
        dtype = accumulator_dtype(self.norm.dtype)
        return tuple(retention.norm(w.to(dtype)).expand(batch_size, -1) for w in self.initial)

    def _made_of(self, held: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The weights that are made of what is held."""
        rows = [w.flatten(0, 1) for w in held]
        units = [unit.to(held[0].dtype).flatten() for unit in self._units(len(held[0]))]
        made = (make(w) for make, w in zip(self.rule.makers(rows, units), rows, strict=True))
        return tuple(w.view_as(old) for w, old in zip(made, held, strict=True))

    def _mapped(self, x: Tensor) -> Tensor:
        """Features of queries or keys (B, H, T, d) of length 1."""
        if self.features is None or self.shares is None:
            return x
        return self.features(x, self.shares.to(x.dtype).unsqueeze(1))

    def _project(
        self, x: Tensor, linear: nn.Linear, stream: int, state: TitansState, real: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, H, T, d) through projection, short convolution and SiLU; the new tail."""
        z = linear(x)
        tail = z
        if self.kernels:
            kernel = cast(Tensor, self.kernels[stream])
            z, tail = short_convolution(z, kernel, state.tails[stream], real)
        return rearrange(F.silu(z), "B T (H d) -> B H T d", H=self.heads), tail

    def _normed(self, y: Tensor) -> Tensor:
        """(B, H, T, d) -> (B, T, H d), each head at unit scale times a learned one."""
        y = rearrange(F.rms_norm(y, (self.size,), None, EPSILON), "B H T d -> B T (H d)")
        return y * self.out_norm.to(y.dtype)


class Titans(GatedMemory):
    """What MAC, MAG and MAL have in common: the block, its gate, the persistent tokens, their options."""

    transient: ClassVar[frozenset[str]] = GatedMemory.transient | {"tails", "recent"}
    silent_with: ClassVar[Mapping[str, Any]] = {"write_gate": "hard"}
    config: TitansConfig
    streams: ClassVar[int] = 3

    def __init__(self, config: TitansConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.memory = TitansMemory(config, dims, self.streams)
        gated = config.write_gate != "none"
        self.gate = nn.Linear(dims.hidden_size, self.memory.heads) if gated else None
        count = config.num_persistent_tokens
        self.persistent = nn.Parameter(torch.empty(count, dims.hidden_size)) if count else None

    @property
    def continues(self) -> Continues:  # type: ignore[override]
        # Within a chunk, surprise is taken at the weights of its start; a gate is a whole segment's, and so
        # is the age.
        whole = self.gate is not None or self.config.reset_every is not None
        return Continues("whole") if whole else Continues("write", self.memory.chunk)

    @classmethod
    def resolve(cls, config: TitansConfig, dims: Dims) -> TitansConfig:
        return config.resolved(dims)

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return config.num_persistent_tokens

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        return config.num_persistent_tokens

    def reset_parameters(self, embedding_std: float) -> None:
        self.memory.reset_parameters()
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=self.gate.in_features**-0.5)
            nn.init.constant_(self.gate.bias, self.config.initial_gate)
        if self.persistent is not None:
            # The input of an attention module is normed, that of a layer is not.
            nn.init.normal_(self.persistent, std=embedding_std if self.site == "layer" else 1.0)

    def init_state(self, batch_size: int) -> TitansState:
        state = self.memory.init_state(batch_size)
        if self.gate is None:
            return state
        none = self.zeros(batch_size, dtype=state.weights[0].dtype)
        return state._replace(written=none, opened=none)

    def remember(
        self, x: Tensor, state: TitansState, mask: Tensor | None
    ) -> tuple[Tensor, TitansState]:
        """What the memory answers to `x` (B, T, D), and the state after it, as far as the gate lets it."""
        answer, new = self.memory(x, state, mask)
        if self.gate is None:
            return answer, new
        with torch.autocast(x.device.type, enabled=False):
            logit = self.gate(x.to(self.gate.weight.dtype)).to(state.weights[0].dtype)
            if mask is not None:
                logit = logit.masked_fill(~mask.unsqueeze(-1), float("-inf"))
            gate = self.gates_at(logit.amax(dim=1))  # (B, H)

            def moved(old: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                share = gate[:, :, None, None]
                return tuple(torch.lerp(a, b, share) for a, b in zip(old, made, strict=True))

            recent = new.recent
            if recent:
                # What a segment was not to write, later windows do not write either.
                count = x.shape[1] if mask is None else mask.sum(dim=1)[:, None, None]
                kept = recent[2].shape[2]
                fresh = torch.arange(kept, device=x.device) >= kept - count
                rates = torch.where(fresh, gate.unsqueeze(-1) * recent[2], recent[2])
                recent = (*recent[:2], rates, *recent[3:])
            return answer, TitansState(
                moved(state.weights, new.weights),
                moved(state.momentum, new.momentum),
                new.tails,
                gate.mean(dim=1),
                gate.amax(dim=1),
                recent,
            )

    def with_persistent(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
        """`x` (B, T, D) and its mask with the persistent tokens in front, and how many these are."""
        if self.persistent is None:
            return x, mask, 0
        count = len(self.persistent)
        tokens = self.persistent.to(x.dtype).expand(x.shape[0], -1, -1)
        mask = None if mask is None else F.pad(mask, (count, 0), value=True)
        return torch.cat([tokens, x], dim=1), mask, count


class TitansBranch(Titans):
    """A memory beside a layer's attention, as MAG's: both read the layer's input."""

    site: ClassVar[Site] = "attention"
    reads_inner: ClassVar[bool] = False
    # Without persistent tokens, which take a share of the attention, and at output_std=0: the defaults.
    neutral: ClassVar[bool] = True

    def __init__(self, config: TitansBranchConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.combine = COMBINATIONS[config.combine]

    def forward(
        self,
        x: Tensor,
        state: TitansState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, TitansState]:
        longer, real, count = self.with_persistent(x, mask)
        y = inner(longer, mask=real)[:, count:]
        answer, new = self.remember(x, state, mask)
        return self.combine(y, answer), (new if write else state)
