"""CAMELoT: tokens that are alike are merged into modes, and each token reads the nearest (He et al. 2024,
*CAMELoT: Towards Large Language Models with Training-Free Consolidated Associative Memory*).

A layer holds N modes: a key and a value, of all its key-value heads together, how many tokens are in them,
and an age. A token whose key is more similar to a mode's than `merge_similarity` goes into that mode's
running means, and any other token takes the place of the mode that was touched longest ago. Tokens are
written one after the other. Each token of the next segments reads the mode nearest to its own key, in one
softmax with the segment's keys. Nothing is trained, and what is written is detached.

What a token wants need not look like the token: asked what followed a word, the nearest mode is the word
again. `read="all"` puts every mode into that softmax, for the base's own queries to find.

The paper itself was not at hand: the page says which of this is known and what was assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

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
from memlm.memory.parts.checks import check_known, check_least
from memlm.memory.parts.folding import folded
from memlm.memory.parts.nearest import queries_at_once
from memlm.memory.parts.retrieved import mixed, none, read_in_parts, share

# Below any length of keys, and the product of a key with a mode that holds nothing: finite, so that it is
# gone when it is multiplied by zero.
SHORTEST, NOTHING = 1e-6, -1e30
READS = ("nearest", "all")


@dataclass(frozen=True, kw_only=True)
class CAMELoTConfig(MemoryConfig):
    """num_modes: modes a layer holds. merge_similarity: the cosine above which a token is merged into the
    nearest mode; above 1 none is, and the modes are the last tokens (at 1 itself rounding decides). read:
    "nearest", one mode for each token, by the token's key, or "all", every mode, weighed by the token's
    queries."""

    num_modes: int = 512
    merge_similarity: float = 0.9
    read: str = option("nearest")


class CAMELoTState(NamedTuple):
    """keys and values (B, N, G dh): the modes' means, float32 or wider. rate (B, N): 1 / (1 + tokens in a
    mode), 1 of one that holds nothing. age (B, N): how many modes were touched after this one."""

    keys: Tensor
    values: Tensor
    rate: Tensor
    age: Tensor


class CAMELoT(Memory):
    """Modes of similar tokens, the nearest of which each token reads."""

    site: ClassVar[Site] = "heads"
    Config: ClassVar[type[MemoryConfig]] = CAMELoTConfig
    reads_inner: ClassVar[bool] = False
    neutral: ClassVar[bool] = True
    differentiable: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("read")
    joins_softmax: ClassVar[bool] = True
    config: CAMELoTConfig

    @classmethod
    def resolve(cls, config: CAMELoTConfig, dims: Dims) -> CAMELoTConfig:
        check_least(config, {"num_modes": 1, "merge_similarity": -1})
        check_known(config, {"read": READS})
        return config

    @classmethod
    def num_inserted(cls, config: CAMELoTConfig, dims: Dims) -> int:
        return 1

    def init_state(self, batch_size: int) -> CAMELoTState:
        modes, width = self.config.num_modes, self.dims.num_kv_heads * self.dims.head_dim
        age = self.zeros(batch_size, modes, dtype=torch.long)
        wide = accumulator_dtype(self.zeros(0).dtype)
        return CAMELoTState(
            self.zeros(batch_size, modes, width, dtype=wide),
            self.zeros(batch_size, modes, width, dtype=wide),
            self.zeros(batch_size, modes, dtype=wide) + 1,
            age + torch.arange(modes, device=age.device),
        )

    def forward(
        self,
        x: QKV,
        state: CAMELoTState,
        inner: InnerHeads,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, CAMELoTState]:
        # Without the scores, which would be held while modes are read.
        local, local_lse, query = inner(x, parts=True)[:3]
        found, lse = self.read(x.k, query, state)
        y = mixed(share(lse, local_lse), found, lse, local)
        return (y, self.write(x.k, x.v, state, mask)) if write else (y, state)

    def read(self, k: Tensor, query: Tensor, state: CAMELoTState) -> tuple[Tensor, Tensor]:
        """What tokens, their keys (B, G, T, dh), read of the modes, (B, H, T, dh), and the log-sum-exp
        (B, H, T) of the scores of what they read, the least number where no mode holds anything.

        query (B, H, T, dh): its product with a key is the score that the key would have.
        """
        wide = state.keys.dtype
        look = self._all if self.config.read == "all" else self._nearest
        with torch.autocast(k.device.type, enabled=False):
            found, lse = look(k.to(wide), query.to(wide), state)
            empty = (state.rate == 1).all(dim=1)
            return found, lse.masked_fill(empty[:, None, None], none(lse))

    def _nearest(self, k: Tensor, query: Tensor, state: CAMELoTState) -> tuple[Tensor, Tensor]:
        """The value of the mode nearest to each token's key, and its score."""
        keys = _joined(k)
        # The length of the token's key changes no order.
        lengths = state.keys.norm(dim=2).clamp(min=SHORTEST)
        similarity = (keys @ state.keys.mT) / lengths.unsqueeze(1)
        similarity = similarity.masked_fill((state.rate == 1).unsqueeze(1), NOTHING)
        near = similarity.argmax(dim=2, keepdim=True).expand(-1, -1, keys.shape[2])
        key, value = (
            rearrange(t.gather(1, near), "B T (G dh) -> B G 1 T dh", G=k.shape[1])
            for t in (state.keys, state.values)
        )
        asked = query.unflatten(1, (k.shape[1], -1))
        return value.expand_as(asked).flatten(1, 2), (asked * key).sum(dim=4).flatten(1, 2)

    def _all(self, k: Tensor, query: Tensor, state: CAMELoTState) -> tuple[Tensor, Tensor]:
        """A softmax over all modes by the queries' scores, and its log-sum-exp."""
        keys, values = (
            rearrange(t, "B N (G dh) -> B G N dh", G=k.shape[1]) for t in (state.keys, state.values)
        )
        nothing = (state.rate == 1)[:, None, None]

        def read(q: Tensor) -> tuple[Tensor, Tensor]:
            scores = (q @ keys.mT).masked_fill(nothing, none(q))
            return scores.softmax(dim=-1) @ values, scores.logsumexp(dim=-1)

        return read_in_parts(read, [query], k.shape[1], queries_at_once(keys))

    @torch.no_grad()
    def write(self, k: Tensor, v: Tensor, state: CAMELoTState, mask: Tensor | None) -> CAMELoTState:
        """Merge the keys and values (B, G, T, dh) of a segment's real tokens, one after the other."""
        wide = state.keys.dtype
        with torch.autocast(k.device.type, enabled=False):
            keys, values = _joined(k.to(wide)), _joined(v.to(wide))
            real = torch.ones_like(keys[..., 0]) > 0 if mask is None else mask
            merging = partial(merged, least=self.config.merge_similarity)
            kept, part, rate, age = folded(merging, keys, state.keys, state.rate, state.age, real)
            kept = kept.unsqueeze(2)
            return CAMELoTState(
                kept * state.keys + part @ keys, kept * state.values + part @ values, rate, age
            )


def merged(
    keys: Tensor, modes: Tensor, rate: Tensor, age: Tensor, real: Tensor, *, least: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What tokens (B, T, d), by `real` (B, T), make of the modes (B, N, d), one after the other.

    Returns `kept` (B, N) and `part` (B, N, T): a mode is then `kept` times what it was, plus `part` times
    the tokens. And the new rate and age. No step looks at a key: a mode's products with the tokens follow
    from those it had and those among the tokens.
    """
    count, rows = keys.shape[1], torch.arange(len(keys), device=keys.device)
    among, lengths = keys @ keys.mT, keys.norm(dim=2).clamp(min=SHORTEST)
    products = (modes @ keys.mT).masked_fill((rate == 1).unsqueeze(2), NOTHING)
    # A row of each: products with the tokens, their coefficients, and how much of the old mode there is.
    table = torch.cat([products, torch.zeros_like(products), torch.ones_like(products[..., :1])], 2)
    alone = torch.eye(count, device=keys.device, dtype=keys.dtype).expand_as(among)
    alone = torch.cat([among, alone, torch.zeros_like(among[..., :1])], dim=2)
    sizes, rate, age = modes.norm(dim=2), rate.clone(), age.clone()
    for t in range(count):
        here = real[:, t]
        similarity = table[:, :, t] / (sizes * lengths[:, t : t + 1]).clamp(min=SHORTEST)
        nearest, at = similarity.max(dim=1)
        merges = nearest > least
        slot = torch.where(merges, at, age.argmax(dim=1))
        old, row, passed = rate[rows, slot], table[rows, slot], age[rows, slot]
        step = torch.where(merges, old, 1.0) * here
        rest = 1 - step
        square = (rest * sizes[rows, slot]).square() + 2 * rest * step * row[:, t]
        square = square + step.square() * among[:, t, t]
        sizes[rows, slot] = square.clamp(min=0).sqrt()
        table[rows, slot] = rest.unsqueeze(1) * row + step.unsqueeze(1) * alone[:, t]
        rate[rows, slot] = torch.where(here, step / (1 + step), old)
        age = age + ((age < passed.unsqueeze(1)) & here.unsqueeze(1))
        age[rows, slot] = torch.where(here, 0, passed)
    return table[..., -1], table[..., count:-1], rate, age


def _joined(x: Tensor) -> Tensor:
    """(B, G, T, dh) -> (B, T, G dh)."""
    return rearrange(x, "B G T dh -> B T (G dh)")
