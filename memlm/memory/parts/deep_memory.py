"""The Titans neural memory: an MLP whose weights are the state (Behrouz et al. 2024, section 3).

Per row and head, h_1 = x, h_{l+1} = kappa_l silu(h_l W_l), M(x) = h_L W_L; kappa_l = sqrt(2 / width) keeps
hidden features at about unit norm. Every token takes a step on ||M(k_t) - v_t||^2, with momentum S:

    S_t = eta_t S_{t-1} - theta_t g_t,   M_t = (1 - alpha_t) M_{t-1} + S_t,   y_t = M_t(q_t)

g_t is the gradient at the weights of the chunk's start (a chunk of one token is the paper's exact rule),
cut to the norm `limit` over all layers together. Clipping is not in the paper; it bounds the state whatever
the rates are. A masked token changes neither M nor S.

A token's gradient is an outer product per layer, so that no token needs weights of its own: with the
matrices of `decays`, a chunk is a few products of (b, n), (n, m) and (b, b) matrices, and only the chunks'
first weights depend on one another. The backward pass is written by hand, second order included.

Letters: N chunks, b tokens of a chunk, R rows times heads; n, m what a layer takes and gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.memory.parts.folding import folded

Weights = tuple[Tensor, ...]

# exp(-40) is nothing next to 1, in float64 too. Deeper logs would cost their neighbours in the same running
# sum digits, and a gate of exactly zero would make inf - inf.
LEAST_LOG = -40.0

# Chunks in one backward pass on a CPU: reads of all of them at once, in memory that a cache holds.
GROUP = 8


class Decays(NamedTuple):
    """What the gates of a chunk come to: everything after it is linear in these.

    mixing (..., b, b): share of the gradient at i in the weights at t, to be subtracted. gains (..., b, 2):
    shares of the first weights and first momentum in the weights at t. closing (..., b, 2): shares of the
    gradient at i in the next chunk's weights and momentum. carry (...): of the first momentum in the next.
    """

    mixing: Tensor
    gains: Tensor
    closing: Tensor
    carry: Tensor


def decays(
    log_keep: Tensor, log_momentum: Tensor, rate: Tensor, mask: Tensor | None = None
) -> Decays:
    """From log(1 - alpha), log eta and theta (..., b); mask (..., b) bool, False for padding."""
    if mask is not None:
        blank = ~mask
        log_keep, log_momentum, rate = (
            x.masked_fill(blank, 0) for x in (log_keep, log_momentum, rate)
        )
    kept, keep = _products(log_keep)
    carried, momentum = _products(log_momentum)
    if mask is not None:
        keep = keep.masked_fill(blank.unsqueeze(-2), 0)  # momentum is not added at a masked token
    mixing = (keep @ momentum) * rate.unsqueeze(-2)
    started = (keep @ carried.unsqueeze(-1)).squeeze(-1)
    return Decays(
        mixing,
        torch.stack([kept, started], dim=-1),
        torch.stack([mixing[..., -1, :], momentum[..., -1, :] * rate], dim=-1),
        carried[..., -1],
    )


def _products(log: Tensor) -> tuple[Tensor, Tensor]:
    """Products of gates: up to t (..., t), and after i up to t (..., t, i), 0 where i > t."""
    total = log.clamp_min(LEAST_LOG).cumsum(dim=-1)
    size = log.shape[-1]
    # Masked before exp: the other way round the backward pass meets 0 * inf.
    future = log.new_full((size, size), -math.inf).triu_(1)
    spans = total.unsqueeze(-1) + (-total).unsqueeze(-2)
    return total.exp(), spans.add_(future).exp_()


def feature_scale(weight: Tensor) -> float:
    """kappa of the layer with this weight (..., m)."""
    return math.sqrt(2 / weight.shape[-1])


def read(q: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """M(q) for fixed weights (B, H, n, m) per layer: (B, H, T, d) -> (B, H, T, m)."""
    with torch.autocast(q.device.type, enabled=False):
        x = q.to(weights[0].dtype)
        for w in weights[:-1]:
            x = F.silu(x @ w) * feature_scale(w)
        return x @ weights[-1]


def read_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    log_momentum: Tensor,
    rate: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    *,
    chunk: int,
    limit: float | None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Weights, Weights]:
    """Write T tokens, reading each after its own write: outputs (B, H, T, m), weights, momentum.

    q, k (B, H, T, d), v (B, H, T, m); log_keep = log(1 - alpha), log_momentum = log eta, rate = theta, all
    (B, H, T); weights, momentum: (B, H, n, m) per layer; mask (B, T) bool, False for padding, where the
    inputs only need to be finite. limit: largest norm of a token's gradient, None for any. Everything is
    computed in the dtype of `weights`. Cuts at multiples of `chunk` change nothing.
    """
    layers = len(weights)

    def on_rows(*given: Tensor) -> tuple[Tensor, ...]:
        q, k, v, log_keep, log_momentum, rate = given[:6]
        states, rest = given[6 : 6 + 2 * layers], given[6 + 2 * layers :]
        y, new_weights, new_momentum = _read_write(
            q,
            k,
            v,
            log_keep,
            log_momentum,
            rate,
            weights=states[:layers],
            momentum=states[layers:],
            chunk=chunk,
            limit=limit,
            mask=rest[0] if rest else None,
        )
        return y, *new_weights, *new_momentum

    masks = () if mask is None else (mask,)
    y, *new = folded(on_rows, q, k, v, log_keep, log_momentum, rate, *weights, *momentum, *masks)
    return y, tuple(new[:layers]), tuple(new[layers:])


def _read_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    log_momentum: Tensor,
    rate: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    chunk: int,
    limit: float | None,
    mask: Tensor | None,
) -> tuple[Tensor, Weights, Weights]:
    """`read_write` on plain tensors."""
    batch, heads, length = rate.shape
    size = min(chunk, length)
    chunks = -(-length // size)
    padding = chunks * size - length
    dtype = weights[0].dtype

    def chunked(x: Tensor) -> Tensor:
        """(B, H, T, ...) -> (N, R, b, ...)."""
        if padding:
            x = torch.cat([x, x.new_zeros(batch, heads, padding, *x.shape[3:])], dim=2)
        return rearrange(x, "B H (N b) ... -> N (B H) b ...", b=size).contiguous()

    with torch.autocast(q.device.type, enabled=False):
        if padding and mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        tokens = [chunked(x.to(dtype)) for x in (q, k, v, log_keep, log_momentum, rate)]
        if mask is not None:
            tokens.append(chunked(mask.unsqueeze(1).expand(batch, heads, length)))
        states = [
            rearrange(torch.cat([w, s.to(dtype)], dim=2), "B H n2 m -> (B H) n2 m")
            for w, s in zip(weights, momentum, strict=True)
        ]
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (*tokens, *states))
        group = 1 if not learning else GROUP if q.device.type == "cpu" else chunks
        outputs = []
        for q, k, v, *gates in zip(*(x.split(group) for x in tokens), strict=True):
            decay = decays(*gates)
            if learning:
                y, *states = _ReadWrite.apply(limit, q, k, v, *decay, *states)
            else:
                y, states, _ = _forward(limit, q, k, v, decay, states)
            outputs.append(y)
        y = rearrange(torch.cat(outputs), "N (B H) b m -> B H (N b) m", H=heads)[:, :, :length]
        halves = [rearrange(s, "(B H) (half n) m -> half B H n m", H=heads, half=2) for s in states]
        # Copies, so that a state neither shares storage nor keeps that of all chunks.
        new_weights, new_momentum = (
            tuple(pair[i].clone(memory_format=torch.contiguous_format) for pair in halves)
            for i in (0, 1)
        )
        return y, new_weights, new_momentum


class _Layer(NamedTuple):
    """What one layer leaves for the backward pass.

    states (N + 1, R, 2n, m): [W; S] where each chunk starts, and at the end. keys (N, R, b, n) and queries
    (N R, b, n): what enters the layer; scores (N R, b, b): their products. errors (N, R, b, m): gradient of
    the loss wrt what leaves it. Below the last layer: gates (N, R, b, m) and query_gates (N R, b, m), the
    sigmoids of what leaves it; returned (N, R, b, m): the next layer's errors, back through its weights.
    When clipping: key_norms, error_norms (N, R, b). What a layer does not have is empty.
    """

    states: Tensor
    keys: Tensor
    queries: Tensor
    scores: Tensor
    errors: Tensor
    gates: Tensor
    query_gates: Tensor
    returned: Tensor
    key_norms: Tensor
    error_norms: Tensor


def _pair(x: Tensor, factors: Tensor) -> Tensor:
    """[x f_1, x f_2]: (..., b, n), (..., b, 2) -> (..., b, 2n)."""
    n = x.shape[-1]
    out = x.new_empty(*x.shape[:-1], 2 * n)
    torch.mul(x, factors[..., :1], out=out[..., :n])
    torch.mul(x, factors[..., 1:], out=out[..., n:])
    return out


def _ends(decay: Decays, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk i's last gains and its carry, each (R, 1, 1)."""
    return (
        decay.gains[i, :, -1, :1, None],
        decay.gains[i, :, -1, 1:, None],
        decay.carry[i, :, None, None],
    )


def _slope(features: Tensor, gates: Tensor) -> Tensor:
    """kappa silu'(z) from h = kappa silu(z) and sigmoid(z): h + gate (kappa - h)."""
    return torch.lerp(features, features.new_full((), feature_scale(features)), gates)


def _forward(
    limit: float | None, q: Tensor, k: Tensor, v: Tensor, decay: Decays, initial: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], tuple[Tensor, list[_Layer]]]:
    """Chunks (N, R, b, n) from states (R, 2n, m): outputs, states, what the backward pass needs."""
    chunks, rows, size, _ = k.shape
    last = len(initial) - 1
    every = range(last + 1)
    widths = [s.shape[1] // 2 for s in initial]
    scales = [feature_scale(s) for s in initial]

    states = [s.new_empty(chunks + 1, *s.shape) for s in initial]
    for stack, s in zip(states, initial, strict=True):
        stack[0].copy_(s)
    errors = [k.new_empty(chunks, rows, size, s.shape[2]) for s in initial]
    gates, returned, hidden = ([torch.empty_like(e) for e in errors[:-1]] for _ in range(3))
    keys = [k, *hidden]
    # Minus the clipping factor: with the sign in the matrices all products are added.
    clip = k.new_full((chunks, rows, size), -1)
    norms = []
    if limit is not None:
        norms = [(torch.empty_like(clip), torch.empty_like(clip)) for _ in every]
        torch.linalg.vector_norm(k, dim=-1, out=norms[0][0])

    for i in range(chunks):
        state = [s[i] for s in states]
        weight = [s[:, :n] for s, n in zip(state, widths, strict=True)]
        x = [key[i] for key in keys]
        error = [e[i] for e in errors]
        for j in range(last):
            z = torch.bmm(x[j], weight[j])
            gate = torch.sigmoid(z, out=gates[j][i])
            torch.mul(z, gate, out=x[j + 1]).mul_(scales[j])
        torch.baddbmm(v[i], x[last], weight[last], beta=-2, alpha=2, out=error[last])
        for j in reversed(range(last)):
            back = torch.bmm(error[j + 1], weight[j + 1].mT, out=returned[j][i])
            torch.mul(back, _slope(x[j + 1], gates[j][i]), out=error[j])
        if limit is not None:
            total = torch.zeros_like(clip[i])
            for j, (key_norms, error_norms) in enumerate(norms):
                if j:
                    torch.linalg.vector_norm(x[j], dim=-1, out=key_norms[i])
                torch.linalg.vector_norm(error[j], dim=-1, out=error_norms[i])
                torch.hypot(total, key_norms[i] * error_norms[i], out=total)
            torch.mul(total.reciprocal_(), -limit, out=clip[i]).clamp_(min=-1)
        closing = decay.closing[i] * clip[i].unsqueeze(-1)
        kept, added, carry = _ends(decay, i)
        for j, n in enumerate(widths):
            new, old_momentum = states[j][i + 1], state[j][:, n:]
            torch.mul(weight[j], kept, out=new[:, :n]).addcmul_(old_momentum, added)
            torch.mul(old_momentum, carry, out=new[:, n:])
            new.baddbmm_(_pair(x[j], closing).mT, error[j])

    mixing = (decay.mixing * clip.unsqueeze(-2)).flatten(0, 1)
    gains = decay.gains.flatten(0, 1)
    y = q.flatten(0, 1)
    nothing = k.new_empty(0)
    layers = []
    for j in every:
        scores = torch.bmm(y, keys[j].flatten(0, 1).mT)
        out = torch.bmm(_pair(y, gains), states[j][:-1].flatten(0, 1))
        out.baddbmm_(scores * mixing, errors[j].flatten(0, 1))
        inner = (gates[j], torch.sigmoid(out), returned[j]) if j < last else (nothing,) * 3
        clipped = norms[j] if norms else (nothing,) * 2
        layers.append(_Layer(states[j], keys[j], y, scores, errors[j], *inner, *clipped))
        if j < last:
            y = out.mul_(inner[1]).mul_(scales[j])
    return out.view(chunks, rows, size, -1), [s[-1] for s in states], (clip, layers)


class _ReadGrads(NamedTuple):
    """Gradients that reads alone bring; those of `mixing` are wrt it with the clipping in it.

    q (N R, b, n), mixing (N, R, b, b), gains (N, R, b, 2), and per layer states (N + 1, R, 2n, m), whose
    last is left open, keys and errors (N, R, b, .).
    """

    q: Tensor
    mixing: Tensor
    gains: Tensor
    states: list[Tensor]
    keys: list[Tensor]
    errors: list[Tensor]


def _back_reads(d_y: Tensor, clip: Tensor, decay: Decays, layers: Sequence[_Layer]) -> _ReadGrads:
    """Back through the reads of all chunks; they need nothing from the chunks after them."""
    gains = decay.gains.flatten(0, 1)
    mixing = (decay.mixing * clip.unsqueeze(-2)).flatten(0, 1)
    d_gains, d_mixing = torch.zeros_like(gains), torch.zeros_like(mixing)
    d_states, d_keys, d_errors = [], [], []
    d_out = rearrange(d_y, "N R b m -> (N R) b m")
    for j, layer in reversed(list(enumerate(layers))):
        x, n = layer.queries, layer.queries.shape[-1]
        d_states.append(torch.empty_like(layer.states))
        torch.bmm(_pair(x, gains).mT, d_out, out=d_states[-1][:-1].flatten(0, 1))
        d_errors.append(torch.bmm((layer.scores * mixing).mT, d_out).view_as(layer.errors))
        d_mixed = torch.bmm(d_out, layer.errors.flatten(0, 1).mT)
        d_mixing.addcmul_(d_mixed, layer.scores)
        d_scores = d_mixed.mul_(mixing)
        d_keys.append(torch.bmm(d_scores.mT, x).view_as(layer.keys))
        by_weights, by_momentum = torch.bmm(d_out, layer.states[:-1].flatten(0, 1).mT).split(n, -1)
        d_gains[..., 0].add_((by_weights * x).sum(dim=-1))
        d_gains[..., 1].add_((by_momentum * x).sum(dim=-1))
        d_x = torch.bmm(d_scores, layer.keys.flatten(0, 1))
        d_x.addcmul_(by_weights, gains[..., :1]).addcmul_(by_momentum, gains[..., 1:])
        if j:
            d_out = d_x.mul_(_slope(x, layers[j - 1].query_gates))
    return _ReadGrads(
        d_x,
        d_mixing.view_as(decay.mixing),
        d_gains.view_as(decay.gains),
        d_states[::-1],
        d_keys[::-1],
        d_errors[::-1],
    )


def _back_writes(
    limit: float | None, clip: Tensor, decay: Decays, layers: Sequence[_Layer], grads: _ReadGrads
) -> tuple[Tensor, Tensor]:
    """Back through the writes, last chunk first: adds to `grads`, leaving there the inputs' gradients.

    Returns those of `closing`, with the clipping in it, and of `carry`. On entry the last of grads.states
    is the final states' gradient; on return the errors of the last layer hold the gradient of its output.
    """
    chunks, rows, size = clip.shape
    last = len(layers) - 1
    every = range(last + 1)
    widths = [layer.keys.shape[-1] for layer in layers]
    closing = decay.closing * clip.unsqueeze(-1)
    d_closing, d_carry = torch.empty_like(closing), torch.empty_like(decay.carry)
    slopes, bends = [], []
    for below, above in itertools.pairwise(layers):
        slope = _slope(above.keys, below.gates)
        slopes.append(slope)
        # kappa silu''(z) = (1 - gate) (2 slope - h)
        bends.append((2 * slope).sub_(above.keys).mul_(1 - below.gates).mul_(below.returned))
    if limit is not None:
        d_clip = (grads.mixing * decay.mixing).sum(dim=-2)
        # Twice the derivative of -limit / sqrt(s) by s = sum |x|^2 |error|^2, where it is above -1.
        bite = torch.where(clip > -1, clip**3 / -(limit**2), 0)
        by_key = [bite * layer.key_norms.square() for layer in layers]
        by_error = [bite * layer.error_norms.square() for layer in layers]

    for i in reversed(range(chunks)):
        d_new = [d[i + 1] for d in grads.states]
        d_x = [d[i] for d in grads.keys]
        d_error = [d[i] for d in grads.errors]
        state = [layer.states[i] for layer in layers]
        weight = [s[:, :n] for s, n in zip(state, widths, strict=True)]
        x = [layer.keys[i] for layer in layers]
        error = [layer.errors[i] for layer in layers]
        kept, added, carry = _ends(decay, i)

        # new = [kept W + added S; carry S] + [x c_1, x c_2]^T error
        share = closing[i]
        d_share = torch.zeros_like(share)
        d_ends = share.new_zeros(rows, 2, 2)
        for j, n in enumerate(widths):
            d_error[j].baddbmm_(_pair(x[j], share), d_new[j])
            d_pair = torch.bmm(error[j], d_new[j].mT)
            d_share.add_((d_pair.view(rows, size, 2, n) * x[j].unsqueeze(-2)).sum(dim=-1))
            d_x[j].addcmul_(d_pair[..., :n], share[..., :1])
            d_x[j].addcmul_(d_pair[..., n:], share[..., 1:])
            d_ends.baddbmm_(d_new[j].view(rows, 2, -1), state[j].view(rows, 2, -1).mT)
        grads.gains[i, :, -1].add_(d_ends[:, 0])
        d_carry[i].copy_(d_ends[:, 1, 1])
        d_closing[i].copy_(d_share)

        if limit is not None:
            bitten = torch.linalg.vecdot(d_share, decay.closing[i]).add_(d_clip[i])
            for j in every:
                d_error[j].addcmul_(error[j], (by_key[j][i] * bitten).unsqueeze(-1))
                d_x[j].addcmul_(x[j], (by_error[j][i] * bitten).unsqueeze(-1))

        # error = slope * (the next layer's error W^T), first layer first since it was made last.
        d_z, d_weight = [], []
        for j in range(last):
            d_z.append(bends[j][i] * d_error[j])
            d_back = slopes[j][i] * d_error[j]
            d_error[j + 1].baddbmm_(d_back, weight[j + 1])
            d_weight.append(torch.bmm(d_back.mT, error[j + 1]))

        # The last error is 2 (z - v); then down the key's own way up.
        d_z.append(d_error[last].mul_(2))
        for j in reversed(every):
            n = widths[j]
            if j < last:
                d_z[j].addcmul_(d_x[j + 1], slopes[j][i])
            d_x[j].baddbmm_(d_z[j], weight[j].mT)
            if j:
                d_w = d_weight[j - 1].baddbmm_(x[j].mT, d_z[j])
            else:
                d_w = torch.bmm(x[j].mT, d_z[j])
            new_weights, new_momentum = d_new[j][:, :n], d_new[j][:, n:]
            here = grads.states[j][i]
            here[:, :n].add_(d_w.addcmul_(new_weights, kept))
            here[:, n:].addcmul_(new_weights, added).addcmul_(new_momentum, carry)
    return d_closing, d_carry


class _ReadWrite(torch.autograd.Function):
    """`_forward` with its gradient."""

    @staticmethod
    def forward(ctx: Any, limit: float | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        decay = Decays(*inputs[3:7])
        q, k, v, *_ = inputs
        y, states, (clip, layers) = _forward(limit, q, k, v, decay, inputs[7:])
        ctx.limit = limit
        ctx.save_for_backward(clip, *decay, *(x for layer in layers for x in layer))
        return y, *states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *d_states: Tensor) -> tuple[Tensor | None, ...]:
        clip, *saved = ctx.saved_tensors
        decay, saved, fields = Decays(*saved[:4]), saved[4:], len(_Layer._fields)
        layers = [_Layer(*saved[i : i + fields]) for i in range(0, len(saved), fields)]
        with torch.autocast(d_y.device.type, enabled=False):
            grads = _back_reads(d_y, clip, decay, layers)
            for stack, d in zip(grads.states, d_states, strict=True):
                stack[-1].copy_(d)
            d_closing, d_carry = _back_writes(ctx.limit, clip, decay, layers, grads)
            return (
                None,
                grads.q.view_as(layers[0].keys),
                grads.keys[0],
                grads.errors[-1].neg_(),
                grads.mixing.mul_(clip.unsqueeze(-2)),
                grads.gains,
                d_closing.mul_(clip.unsqueeze(-1)),
                d_carry,
                *(d[0] for d in grads.states),
            )
