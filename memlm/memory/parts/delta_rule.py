"""One recurrence for linear attention, GLA, the delta rules and their gated forms, in chunks.

Per row and head, a state S (dk, dv); at each token a decay D, an erase key e, a write key w and a
target u:

    S~ = D_t S_{t-1},   d_t = u_t - e_t S~,   S_t = S~ + w_t (x) d_t,   o_t = q_t S_t

Which rule that is depends on what stands for D, e and u (Yang et al. 2024, *Gated Delta Networks*,
section 3; *Gated Linear Attention*, section 4; *Kimi Linear* for decay by channel). Within a chunk
of C tokens, with g the running sum of log D and G_ti = exp(g_t - g_i) for i <= t,

    A_ti = (e_t . w_i) G_ti, i < t,     (I + A) Delta = U - (e^g E) S_0
    O = (e^g Q) S_0 + ((Q W^T) G) Delta,     S_C = e^{g_C} S_0 + (e^{g_C - g} W)^T Delta

so a chunk costs one triangular solve and a few products, of all chunks at once; only the chunks'
first states depend on one another. Exponents are never positive. A token with e = u = 0 and log D =
0 leaves the state as it was, to the bit.

Letters: N chunks, C tokens of a chunk, dk, dv size of keys and values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# Decay by channel holds (C, C, dk) numbers for each chunk.
CHANNEL_CHUNK = 16


class Tokens(NamedTuple):
    """What the tokens of a piece of text do to the state, and ask of it.

    query (B, H, R, T, dk): R questions of each token. key (B, H, T, dk), value (B, H, T, dv): w = key, and
    u = step value. step (B, H, T): how far each token writes. erases: whether e = step key; if not, nothing
    is erased. log_decay (B, H, T), or (B, H, T, dk) by channel, at most 0; None: nothing decays.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    step: Tensor
    log_decay: Tensor | None = None
    erases: bool = True


def delta_rule(tokens: Tokens, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, R, T, dv) and the state (B, H, dk, dv) after the last token.

    chunk: tokens computed at once; it changes nothing but rounding.
    """
    length, step = tokens.key.shape[2], tokens.step.unsqueeze(-1)
    by_channel = tokens.log_decay is not None and tokens.log_decay.ndim == 4
    size = min(chunk, CHANNEL_CHUNK if by_channel else chunk, length)
    erase = step * tokens.key if tokens.erases else None
    parts = (tokens.key, step * tokens.value, erase, tokens.log_decay)
    w, u, e, log_decay = (_chunked(part, size) for part in parts)
    assert w is not None and u is not None

    keep = None if log_decay is None else log_decay.cumsum(dim=3)  # g
    total = None if keep is None else keep[:, :, :, -1:]  # g_C
    solved, erased = u, None
    if e is not None:
        mixing = _products(e, w, keep).tril(-1)
        joined = torch.cat([u, _scaled(e, keep)], dim=-1)
        found = torch.linalg.solve_triangular(mixing, joined, upper=False, unitriangular=True)
        solved, erased = found.split([u.shape[-1], e.shape[-1]], dim=-1)
    left = w if keep is None or total is None else _scaled(w, total - keep)
    started, deltas = [], []
    for index in range(w.shape[2]):
        started.append(state)
        delta = solved[:, :, index]
        if erased is not None:
            delta = delta - erased[:, :, index] @ state
        deltas.append(delta)
        if total is not None:
            state = _scaled(state, total[:, :, index], keys_first=True)
        state = state + left[:, :, index].mT @ delta
    known, learned = torch.stack(started, dim=2), torch.stack(deltas, dim=2)
    answers = []
    for query in tokens.query.unbind(dim=2):
        q = _chunked(query, size)
        assert q is not None
        found = _scaled(q, keep) @ known + _products(q, w, keep).tril() @ learned
        answers.append(rearrange(found, "b h n c d -> b h (n c) d")[:, :, :length])
    return torch.stack(answers, dim=2), state


def _chunked(x: Tensor | None, size: int) -> Tensor | None:
    """(B, H, T, ...) -> (B, H, N, C, ...), with zeros at the end: tokens that do nothing."""
    if x is None:
        return None
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (*(0,) * (2 * (x.ndim - 3)), 0, missing))
    return x.unflatten(2, (-1, size))


def _scaled(x: Tensor, log: Tensor | None, keys_first: bool = False) -> Tensor:
    """`x` times exp(log), log by token or by channel of the keys; keys_first: of a state (..., dk, dv)."""
    if log is None:
        return x
    if keys_first:
        return x * (log.exp().unsqueeze(-1) if log.ndim == 3 else log.exp().mT)
    return x * (log.exp().unsqueeze(-1) if log.ndim < x.ndim else log.exp())


def _products(a: Tensor, b: Tensor, keep: Tensor | None) -> Tensor:
    """(a_t . b_i) G_ti: (B, H, N, C, dk) each -> (B, H, N, C, C), of use where i <= t."""
    if keep is None:
        return a @ b.mT
    size = a.shape[3]
    future = a.new_full((size, size), -math.inf).triu(1)
    if keep.ndim == 4:
        # Masked before exp: the other way round the backward pass meets 0 * inf.
        return (a @ b.mT) * (keep.unsqueeze(-1) - keep.unsqueeze(-2) + future).exp()
    spans = keep.unsqueeze(4) - keep.unsqueeze(3) + future.unsqueeze(-1)
    return torch.einsum("bhntc,bhnic,bhntic->bhnti", a, b, spans.exp())
