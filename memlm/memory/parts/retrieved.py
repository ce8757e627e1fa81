"""Attention to entries that were picked from a store, and its place beside the attention over a segment.

Letters: R queries of a group, n entries of all stores together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def none(like: Tensor) -> float:
    """Stands for the score of no key: finite, so that no gradient becomes NaN."""
    return torch.finfo(like.dtype).min


def entries_of(blocks: Tensor, size: int, length: Tensor) -> tuple[Tensor, Tensor]:
    """Places (..., size) in a store of all entries of `blocks` (B, ...), and which hold something.

    length (B,): how many of the store's places are filled, from the left.
    """
    places = blocks.unsqueeze(-1) * size + torch.arange(size, device=blocks.device)
    return places, places < length.view(-1, *[1] * blocks.ndim)


def attend(
    index: Tensor, real: Tensor, q: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax attention of queries (B, G, R, dh) to entries (B, G, R, k) of keys and values (n, dh).

    real (B, G, R, k) bool: which of the entries are there. Returns (B, G, R, dh) and the log-sum-exp
    (B, G, R) of the scores, `none` where nothing is.
    """
    k, v = (
        entries.index_select(0, index.flatten()).unflatten(0, index.shape).to(q.dtype)
        for entries in (keys, values)
    )
    scores = torch.einsum("bgrkd,bgrd->bgrk", k, q).masked_fill(~real, none(q))
    found = torch.einsum("bgrkd,bgrk->bgrd", v, scores.softmax(dim=-1))
    return found, scores.logsumexp(dim=-1).masked_fill(~real.any(dim=-1), none(q))


def share(found: Tensor, local: Tensor) -> Tensor:
    """What found keys weigh in one softmax with local ones, from the log-sum-exps (B, H, T) of both."""
    return torch.sigmoid(found - local.to(found.dtype))


def mixed(weight: Tensor, found: Tensor, lse: Tensor, local: Tensor) -> Tensor:
    """`found` (B, H, T, dh) with `weight` (B, H, T), and `local` with the rest, in its dtype.

    lse (B, H, T): that of what was found. Where nothing was, `local` as it is.
    """
    weight = weight.unsqueeze(-1)
    joined = weight * found + (1 - weight) * local.to(found.dtype)
    return torch.where(lse.unsqueeze(-1) > none(lse), joined.to(local.dtype), local)
