"""The keys of a store that are nearest to a query, found among all of them, exactly.

Letters: G stores, R queries each, n keys a store.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from memlm.memory.parts.retrieved import none

# Numbers of a search's scores held at once: 64 MiB in float32.
SCORES = 2**24


def queries_at_once(keys: Tensor) -> int:
    """How many queries of each store of keys (B, G, n, dh) may search it together."""
    return max(1, SCORES // max(1, keys.shape[:3].numel()))


@torch.no_grad()
def nearest(
    q: Tensor, keys: Tensor, there: Tensor, count: int, least: float | None = None
) -> tuple[Tensor, Tensor]:
    """Of keys (B, G, n, dh), the `count` with the largest products with queries (B, G, R, dh).

    there (B, n) bool: which places hold a key. least: products below it do not count. Returns places
    (B, G, R, count), in no order, and which of them are real.
    """
    empty = torch.where(there, 0.0, -torch.inf).to(keys.dtype)
    scores = torch.baddbmm(
        rearrange(empty.unsqueeze(1).expand(keys.shape[:3]), "B G n -> (B G) 1 n"),
        rearrange(q.to(keys.dtype), "B G R dh -> (B G) R dh"),
        rearrange(keys, "B G n dh -> (B G) dh n"),
    )
    near, index = scores.topk(count, dim=-1, sorted=False)
    real = near >= (none(near) if least is None else least)
    places, real = (rearrange(t, "(B G) R k -> B G R k", G=keys.shape[1]) for t in (index, real))
    return places, real
