"""One recurrence for linear attention, GLA, the delta rules and their gated forms, in chunks.

Per row and head, a state S (dk, dv); at each token a decay D, an erase key e, a write key w and a
target u:

    S~ = D_t S_{t-1},   d_t = u_t - e_t S~,   S_t = S~ + w_t (x) d_t,   o_t = q_t S_t

Which rule that is depends on what stands for D, e and u (Yang et al. 2024, *Gated Delta Networks*,
section 3; *Gated Linear Attention*, section 4; *Kimi Linear* for decay by channel). Within a chunk
of C tokens, with g the running sum of log D and G_ti = exp(g_t - g_i) for i <= t,

    A_ti = (e_t . w_i) G_ti, i < t,     (I + A) Delta = U - (e^g E) S_0
    O = (e^g Q) S_0 + ((Q W^T) G) Delta,     S_C = e^{g_C} S_0 + (e^{g_C - g} W)^T Delta

so a chunk costs one triangular solve and a few products. All but the solve and the states' own products
is computed for many chunks at once. Exponents are never positive. A token with e = u = 0 and log D =
0 leaves the state as it was, to the bit.

Letters: N chunks, C tokens of a chunk, dk, dv size of keys and values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Decay by channel holds (C, C, dk) numbers for each chunk.
CHANNEL_CHUNK = 16
# The most numbers that a CPU takes in one operation: its cache shall hold what the next one asks for.
AT_ONCE = 2**17


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

    def part(self, start: int, end: int) -> Tokens:
        """The tokens from `start` up to `end`."""
        key, value, step, decay = (
            None if x is None else x[:, :, start:end]
            for x in (self.key, self.value, self.step, self.log_decay)
        )
        assert key is not None and value is not None and step is not None
        return Tokens(self.query[:, :, :, start:end], key, value, step, decay, self.erases)


def delta_rule(tokens: Tokens, state: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, R, T, dv) and the state (B, H, dk, dv) after the last token.

    chunk: tokens computed at once; it changes nothing but rounding.
    """
    batch, heads, length, keys = tokens.key.shape
    by_channel = tokens.log_decay is not None and tokens.log_decay.ndim == 4
    size = min(chunk, CHANNEL_CHUNK if by_channel else chunk, length)
    group = length
    if tokens.key.device.type == "cpu":
        each = batch * heads * size * max(keys, size * (keys if by_channel else 1))
        group = size * max(1, AT_ONCE // each)
    answers = []
    for start in range(0, length, group):
        answer, state = _together(tokens.part(start, start + group), state, size)
        answers.append(answer)
    return answers[0] if len(answers) == 1 else torch.cat(answers, dim=3), state


def _together(tokens: Tokens, state: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`delta_rule` in chunks of `size`, all that needs no state computed for every chunk at once."""
    length = tokens.key.shape[2]
    given = (tokens.key, tokens.value, tokens.step, tokens.log_decay)
    w, value, step, log_decay = (_chunked(part, size) for part in given)
    assert w is not None and value is not None and step is not None
    u = step.unsqueeze(-1) * value
    e = step.unsqueeze(-1) * w if tokens.erases else None

    keep = None if log_decay is None else log_decay.cumsum(dim=3)  # g
    total = None if keep is None else keep[:, :, :, -1:]  # g_C
    spans = None if keep is None else _spans(keep)
    mixing = None if e is None else _products(e, w, spans)
    erased = None if e is None else _scaled(e, keep)
    left = w if keep is None or total is None else _scaled(w, total - keep)
    deltas, started = [], []
    solves, erasing, decays = (
        None if x is None else x.unbind(dim=2) for x in (mixing, erased, total)
    )
    chunks = zip(u.unbind(dim=2), left.unbind(dim=2), strict=True)
    for index, (delta, leaving) in enumerate(chunks):
        if solves is not None and erasing is not None:
            found = delta - erasing[index] @ state
            # Neither the diagonal is looked at nor what is above it.
            delta = torch.linalg.solve_triangular(
                solves[index], found, upper=False, unitriangular=True
            )
        started.append(state)
        deltas.append(delta)
        if decays is not None:
            state = _scaled(state, decays[index], keys_first=True)
        state = state + leaving.mT @ delta
    known, learned = torch.stack(started, dim=2), torch.stack(deltas, dim=2)
    answers = []
    for query in tokens.query.unbind(dim=2):
        q = _chunked(query, size)
        assert q is not None
        answer = _scaled(q, keep) @ known + _products(q, w, spans) @ learned
        answers.append(answer.flatten(2, 3)[:, :, :length])
    return torch.stack(answers, dim=2), state


def _chunked(x: Tensor | None, size: int) -> Tensor | None:
    """(B, H, T, ...) -> (B, H, N, C, ...), with zeros at the end: tokens that do nothing."""
    if x is None:
        return None
    missing = -x.shape[2] % size
    if missing:
        x = F.pad(x, (*(0,) * (2 * (x.ndim - 3)), 0, missing))
    # Heads that lie side by side in memory are slow to multiply.
    return x.unflatten(2, (-1, size)).contiguous()


def _scaled(x: Tensor, log: Tensor | None, keys_first: bool = False) -> Tensor:
    """`x` times exp(log), log by token or by channel of the keys; keys_first: of a state (..., dk, dv)."""
    if log is None:
        return x
    if keys_first:
        return x * (log.exp().unsqueeze(-1) if log.ndim == 3 else log.exp().mT)
    return x * (log.exp().unsqueeze(-1) if log.ndim < x.ndim else log.exp())


def _spans(keep: Tensor) -> Tensor:
    """G_ti, zero where i > t, from g (B, H, N, C): (B, H, N, C, C), or (B, H, N, C, C, dk) by channel."""
    size = keep.shape[3]
    future = torch.ones(size, size, dtype=torch.bool, device=keep.device).triu_(1)
    future = future if keep.ndim == 4 else future.unsqueeze(-1)
    # Masked before exp: the other way round the backward pass meets 0 * inf.
    return (keep.unsqueeze(4) - keep.unsqueeze(3)).masked_fill_(future, -math.inf).exp_()


def _products(a: Tensor, b: Tensor, spans: Tensor | None) -> Tensor:
    """(a_t . b_i) G_ti, zero where i > t: (B, H, N, C, dk) each -> (B, H, N, C, C)."""
    if spans is None:
        return (a @ b.mT).tril()
    if spans.ndim == 5:
        return (a @ b.mT) * spans
    return torch.einsum("bhntc,bhnic,bhntic->bhnti", a, b, spans)
