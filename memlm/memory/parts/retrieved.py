"""Attention to entries that were picked from a store, and its place beside the attention over a segment.

Letters: R queries of a group, n entries of all stores together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from einops import rearrange
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


class Blocks(NamedTuple):
    """A store of keys and values (B, G, N, dh) in blocks of `size`, of which `length` (B,) are filled."""

    keys: Tensor
    values: Tensor
    length: Tensor
    size: int


def attend_in_all(
    q: Tensor, chosen: Tensor, near: Tensor | None, stored: Blocks
) -> tuple[Tensor, Tensor]:
    """What queries (B, G, R, dh) read of the blocks (B, G, R, k) that each has `chosen`, without copies.

    near (B, G, R, k): what the blocks weigh, as scores; None: what their entries do. Returns (B, G, R, dh)
    and the log-sum-exp (B, G, R) of what they weigh. Products are made with all that is stored, which costs
    less than copies for each query where the store is not many times what one reads.
    """
    index = chosen.unsqueeze(-1).expand(*chosen.shape, stored.size)
    real = entries_of(chosen, stored.size, stored.length)[1]
    every = (q @ stored.keys.mT).unflatten(-1, (-1, stored.size))
    scores = every.gather(-2, index).masked_fill(~real, none(q))
    if near is None:
        near = scores.logsumexp(dim=-1).masked_fill(~real.any(dim=-1), none(q))
    parts = scores.softmax(dim=-1) * near.softmax(dim=-1).unsqueeze(-1)
    found = torch.zeros_like(every).scatter(-2, index, parts).flatten(-2) @ stored.values
    return found, near.logsumexp(dim=-1)


def attend_to_copies(
    q: Tensor, chosen: Tensor, near: Tensor | None, stored: Blocks
) -> tuple[Tensor, Tensor]:
    """As `attend_in_all`, by a copy of what each query reads."""
    (batch, groups, places), k = stored.keys.shape[:3], chosen.shape[-1]
    first = torch.arange(batch * groups, device=q.device).view(batch, groups, 1, 1) * places
    # Every pair of a query and a block it reads is asked by itself, among the block's entries.
    index, real = entries_of(chosen.flatten(2), stored.size, stored.length)
    entries = (t.flatten(0, 2) for t in (stored.keys, stored.values))
    read, lse = attend(index + first, real, q.repeat_interleave(k, dim=2), *entries)
    near = lse.unflatten(2, (-1, k)) if near is None else near
    found = torch.einsum("bgrk,bgrkd->bgrd", near.softmax(dim=-1), read.unflatten(2, (-1, k)))
    return found, near.logsumexp(dim=-1)


def read_in_parts(
    read: Callable[..., tuple[Tensor, Tensor]], queries: Sequence[Tensor], groups: int, rows: int
) -> tuple[Tensor, Tensor]:
    """What `read` finds for `queries`, each (B, H, T, dh), with those of a group's heads together.

    read is asked `rows` of them at a time, (B, G, R, dh) of each, and returns (B, G, R, dh) and the
    log-sum-exp (B, G, R). Returns (B, H, T, dh) and (B, H, T).
    """
    h = queries[0].shape[1] // groups
    pieces = (rearrange(q, "B (G h) T dh -> B G (h T) dh", h=h).split(rows, 2) for q in queries)
    parts = [read(*piece) for piece in zip(*pieces, strict=True)]
    found, lse = (torch.cat(part, dim=2) for part in zip(*parts, strict=True))
    return (
        rearrange(found, "B G (h T) dh -> B (G h) T dh", h=h),
        rearrange(lse, "B G (h T) -> B (G h) T", h=h),
    )


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
