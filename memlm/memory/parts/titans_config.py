"""Options of the memories whose weights are their state, and what they choose among.

Titans' rule (Behrouz et al. 2024), and those of MIRAS and ATLAS as changes of it: what an error costs, what
is made of what is held, which tokens a step learns, what the layers are. Each may be chosen by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from memlm.memory.base import Dims, option
from memlm.memory.parts.checks import check_least, head_sizes
from memlm.memory.parts.feature_maps import quadratic
from memlm.memory.parts.gates import GatedConfig
from memlm.memory.parts.memory_rules import (
    SQUARE,
    Huber,
    Normed,
    Objective,
    Power,
    Retention,
    Softmax,
)

OBJECTIVES: dict[str, Callable[[TitansConfig], Objective]] = {
    "square": lambda config: SQUARE,
    "huber": lambda config: Huber(),
    "power": lambda config: Power(config.error_power),
}
RETENTIONS: dict[str, Callable[[TitansConfig], Retention | None]] = {
    "decay": lambda config: None,
    "norm": lambda config: Normed(config.norm_power),
    "softmax": lambda config: Softmax(config.mass),
}
# How many features of keys and queries of size d, and which.
FEATURES: dict[str, tuple[Callable[[int], int], Callable[[Tensor, Tensor], Tensor] | None]] = {
    "linear": (lambda d: d, None),
    "quadratic": (lambda d: d + d * (d + 1) // 2, quadratic),
}
# Options that are read only where another one has a certain value.
SERVING: dict[str, tuple[str, Any]] = {
    "initial_momentum": ("momentum", True),
    "initial_bound": ("objective", "huber"),
    "error_power": ("objective", "power"),
    "norm_power": ("retention", "norm"),
    "mass": ("retention", "softmax"),
    "muon": ("momentum", True),
}


@dataclass(frozen=True, kw_only=True)
class TitansConfig(GatedConfig):
    """Options of every memory whose weights are its state.

    num_heads: heads of the memory, None for the base's attention heads; head_dim: their size, None for
    hidden size / heads. depth: layers of the MLP that is the memory; expansion: width of its hidden layers
    in head sizes. chunk_length: tokens whose surprise is taken at the same weights; None picks 64, or the
    segment where that is shorter; 1 is the paper's rule, token by token. num_persistent_tokens: learned
    tokens before each segment. conv_size: width of the short causal convolutions after the query,
    key and value projections; 0 for none, 4 as in the paper.
    max_rate: largest learning rate, as the share of a token's error that its gradient step takes back in
    the end, momentum included; with coupled_rate=False in that step alone, the rate being a gate of its
    own, as in the paper. initial_rate, initial_momentum, initial_forgetting: where the three gates start.
    max_surprise: largest gradient norm of one token, in units of sqrt(head_dim), so that no rate can make
    the memory diverge; None for no limit. output_std: scale of the output projection at the start; 0
    leaves the stage as it was.
    momentum: whether a step carries on those before it; without it the learning rate is a gate of its own.
    objective: what an error costs, "square", or "huber", whose pull grows no further beyond a bound that
    each token sets for itself (`yaad`), or "power", the sum of its numbers to a power (`moneta`).
    initial_bound: where the bound starts, in units of sqrt(head_dim); float("inf") for the square.
    error_power: that power. retention: "decay", or "norm", where the weights are what is held, divided by
    its norm (`moneta`), or "softmax", where they are its softmax (`memora`), token by token and so slower.
    norm_power: the norm's q. mass: what the weights of an output come to, over its inputs. residual:
    whether the memory is x + LN(MLP(x)) in place of MLP(x), so that the last layer's length does not
    matter.
    window: how many tokens each step learns again, the last of them its own (`omega`); a token's rate is
    shared out among the steps that take it. key_features: "linear", keys and queries as they are, or
    "quadratic", with all products of two of their numbers. gated: whether hidden layers are silu(a) b, two
    products in place of one. muon: whether momentum is made orthogonal before it is added, for each token
    and so many times slower.
    reset_every: after how many segments the memory starts again from its learned start, as the local ones
    of TNT beside one that does not; None for never.
    write_gate: "none", the paper's, or "sigmoid" or "hard": how far each head moves, over a whole segment,
    from what it was to what the segment would make of it, momentum and forgetting included. The segment's
    gate is that of its most telling token; within the segment, tokens read what was written before them in
    any case. What goes with it: as in `GatedConfig`. initial_gate: its logit at the start.
    """

    write_gate: str = "none"
    initial_gate: float = option(0.0)

    num_heads: int | None = None
    head_dim: int | None = None
    depth: int = 2
    expansion: int = 2
    chunk_length: int | None = None
    num_persistent_tokens: int = 0
    conv_size: int = 0
    max_rate: float = 1.0
    coupled_rate: bool = True
    initial_rate: float = option(0.05)
    initial_momentum: float = option(0.9)
    initial_forgetting: float = option(0.01)
    max_surprise: float | None = 4.0
    output_std: float = option(0.0)

    momentum: bool = True
    objective: str = "square"
    initial_bound: float = option(1.0)
    window: int = 1
    key_features: str = "linear"
    gated: bool = False
    error_power: float = 3.0
    retention: str = "decay"
    norm_power: float = 4.0
    residual: bool = False
    mass: float = 1.0
    muon: bool = False
    reset_every: int | None = None

    # What makes a mechanism that is named after its rule that mechanism.
    own: ClassVar[Mapping[str, Any]] = {}
    # Tokens of a chunk where chunk_length is open.
    longest_chunk: ClassVar[int] = 64
    # Numbers of a head where num_heads and head_dim are open; None: as many as a head of the base has.
    widest_head: ClassVar[int | None] = None

    @classmethod
    def paper(cls) -> Self:
        """Convolutions of 4, three gates of their own, no limit to a token's gradient.

        Nothing then bounds a step; if training diverges, give max_surprise. Not known, and so at the
        defaults: heads, depth and width of the memory, how many persistent tokens, how long a chunk, the
        largest rate, where the gates start.
        """
        return cls(conv_size=4, coupled_rate=False, max_surprise=None)

    def resolved(self, dims: Dims) -> Self:
        """Fill what is open from `dims`; ValueError for what cannot be."""
        self.check_gates(("none", "sigmoid", "hard"))
        self._check_rule()
        heads, size = head_sizes(self.num_heads, self.head_dim, dims)
        if self.num_heads is None and self.head_dim is None and self.widest_head is not None:
            parts = next(
                p for p in range(1, size + 1) if not size % p and size // p <= self.widest_head
            )
            heads, size = heads * parts, size // parts
        chunk = self.chunk_length
        if chunk is None:
            chunk = min(self.longest_chunk, dims.segment_length)
        filled = replace(self, num_heads=heads, head_dim=size, chunk_length=chunk)
        least = dict.fromkeys(("head_dim", "depth", "expansion", "chunk_length", "window"), 1)
        zero = dict.fromkeys(("num_persistent_tokens", "conv_size", "output_std"), 0)
        check_least(filled, least | zero)
        if chunk > dims.segment_length:
            raise ValueError(
                f"chunk_length={chunk} is longer than segment_length={dims.segment_length}; use at most "
                "a segment"
            )
        if not 0 < self.initial_rate < self.max_rate:
            raise ValueError(
                f"initial_rate={self.initial_rate} must lie between 0 and max_rate={self.max_rate}"
            )
        for name in ("initial_momentum", "initial_forgetting"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if self.max_surprise is not None and self.max_surprise <= 0:
            raise ValueError(f"max_surprise={self.max_surprise} must be above 0, or None")
        return filled

    def _check_rule(self) -> None:
        """Refuse a rule that is unknown, another mechanism's, or has options that nothing reads."""
        for name, value in self.own.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not the rule of {type(self).__name__}, which is "
                    f"{name}={value!r}; use TitansMAGConfig for rules of your own"
                )
        choices: dict[str, Mapping[str, Any]] = {
            "objective": OBJECTIVES,
            "retention": RETENTIONS,
            "key_features": FEATURES,
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; use {' or '.join(map(repr, known))}"
                )
        if self.gated and self.depth == 1:
            raise ValueError("gated=True needs a hidden layer, but depth=1; use depth=2 or more")
        for name, (other, value) in SERVING.items():
            given = getattr(self, name)
            if given != getattr(TitansConfig, name) and getattr(self, other) != value:
                raise ValueError(
                    f"{name}={given} is read with {other}={value!r} alone; leave it out, or give that"
                )
        if not self.initial_bound > 0:
            raise ValueError(f"initial_bound={self.initial_bound} must be above 0")
        for name, least in (("error_power", 1), ("norm_power", 2)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.mass > 0:
            raise ValueError(f"mass={self.mass} must be above 0")
        if self.reset_every is not None and self.reset_every < 1:
            raise ValueError(
                f"reset_every={self.reset_every} must be at least 1, or None for never"
            )
        if self.reset_every is not None and self.write_gate != "none":
            raise ValueError(
                f"reset_every={self.reset_every} forgets what write_gate={self.write_gate!r} is to keep; "
                "use write_gate='none', or reset_every=None"
            )


def gated(y: Tensor, answer: Tensor) -> Tensor:
    """y * 2 sigmoid(answer): an answer of zero leaves y as it was."""
    return y * (2 * torch.sigmoid(answer))


COMBINATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "multiply": gated}


@dataclass(frozen=True, kw_only=True)
class TitansBranchConfig(TitansConfig):
    """Options of a Titans memory that answers beside an attention.

    combine: how its answer meets what attention returns, "add", or "multiply", where it is a gate from 0 to
    2 for each channel, 1 where the memory says nothing.
    """

    combine: str = option("add")

    @classmethod
    def paper(cls) -> Self:
        """As `TitansConfig.paper`, and multiplied: o = y (x) M(.), through a sigmoid.

        The paper norms both and names a nonlinearity; which, it leaves open.
        """
        return replace(super().paper(), combine="multiply")

    def resolved(self, dims: Dims) -> Self:
        """As `TitansConfig.resolved`."""
        if self.combine not in COMBINATIONS:
            raise ValueError(
                f"combine={self.combine!r} is unknown; use {' or '.join(map(repr, COMBINATIONS))}"
            )
        return super().resolved(dims)
