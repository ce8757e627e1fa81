"""A deep memory: an MLP whose weights are the state (Behrouz et al. 2024, *Titans*, section 3).

Per row and head, h_1 = x, h_{l+1} = kappa_l silu(h_l W_l), M(x) = h_L W_L; kappa_l = sqrt(2 / width) keeps
hidden features at about unit norm. Every token takes a step on ||M(k_t) - v_t||^2, with momentum S:

    S_t = eta_t S_{t-1} - theta_t g_t,   M_t = (1 - alpha_t) M_{t-1} + S_t,   y_t = M_t(q_t)

g_t is the gradient at the weights of the chunk's start (a chunk of one token is the paper's exact rule),
cut to the norm `limit` over all layers together. Clipping is not in the paper; it bounds the state whatever
the rates are. A masked token changes neither M nor S. Without momentum S_t = - theta_t g_t. What an error
costs, and what stands between the layers, is a `Rule`'s; where it makes weights that are not linear in the
gradients, `token_weights` takes each chunk.

A token's gradient is an outer product per layer, so that no token needs weights of its own: with the
matrices of `decays`, a chunk is a few products of (b, n), (n, m) and (b, b) matrices, and only the chunks'
first weights depend on one another. The backward pass is written by hand, second order included.

Letters: N chunks, b tokens of a chunk, R rows times heads; n, m what a layer takes and gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from memlm.memory.parts.decays import Decays, decays
from memlm.memory.parts.folding import folded
from memlm.memory.parts.memory_rules import TITANS, Rule
from memlm.memory.parts.token_weights import read_write_chunks

Weights = tuple[Tensor, ...]

# Chunks taken together on a CPU: their gates, and for a backward pass their reads, in memory that a cache
# holds.
GROUP = 8


def read(q: Tensor, weights: Sequence[Tensor], rule: Rule = TITANS) -> Tensor:
    """M(q) for fixed weights (B, H, n, m) per layer: (B, H, T, d) -> (B, H, T, m)."""
    with torch.autocast(q.device.type, enabled=False):
        x = q.to(weights[0].dtype)
        for w in weights[:-1]:
            x = rule.activation.of(x @ w)
        return rule.answer(x @ weights[-1])


def read_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    *,
    chunk: int,
    limit: float | None,
    mask: Tensor | None = None,
    rule: Rule = TITANS,
    bound: Tensor | None = None,
    recent: Sequence[Tensor] = (),
    units: Sequence[Tensor] = (),
) -> tuple[Tensor, Weights, Weights]:
    """Write T tokens, reading each after its own write: outputs (B, H, T, m), weights, momentum.

    q, k (B, H, T, d), v (B, H, T, m); log_keep = log(1 - alpha), log_momentum = log eta, rate = theta, all
    (B, H, T); weights, momentum: (B, H, n, m) per layer; mask (B, T) bool, False for padding, where the
    inputs only need to be finite. limit: largest norm of a token's gradient, None for any. Without momentum
    log_momentum is None and momentum is (). bound (B, H, T): what the rule's objective asks of each token,
    None where it asks nothing. recent: k, v, rate and, if there is one, bound of the window - 1 tokens
    before these, at rate zero where there were none; () for a window of 1. With more, masked tokens stand
    last. units: (B, H) per layer for the rule's retention, () without one: `weights` is then what is held,
    and what is read and learned by is made of it where a chunk starts. Everything is computed in the dtype
    of `weights`. Cuts at multiples of `chunk` change nothing.
    """
    layers = len(weights)
    states = (*weights, *momentum)
    options = {"log_momentum": log_momentum, "bound": bound, "mask": mask}
    there = {name: value for name, value in options.items() if value is not None}

    def on_rows(*given: Tensor) -> tuple[Tensor, ...]:
        q, k, v, log_keep, rate = given[:5]
        rest = iter(given[5 + len(states) :])
        y, new_weights, new_momentum = _read_write(
            q,
            k,
            v,
            log_keep,
            rate,
            weights=given[5 : 5 + layers],
            momentum=given[5 + layers : 5 + len(states)],
            chunk=chunk,
            limit=limit,
            rule=rule,
            recent=[next(rest) for _ in recent],
            units=[next(rest) for _ in units],
            **{name: next(rest) for name in options if name in there},  # type: ignore[arg-type]
        )
        return y, *new_weights, *new_momentum

    rest = (*recent, *units, *there.values())
    y, *new = folded(on_rows, q, k, v, log_keep, rate, *states, *rest)
    return y, tuple(new[:layers]), tuple(new[layers:])


def _read_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_keep: Tensor,
    rate: Tensor,
    weights: Sequence[Tensor],
    momentum: Sequence[Tensor],
    chunk: int,
    limit: float | None,
    rule: Rule,
    recent: Sequence[Tensor],
    units: Sequence[Tensor],
    log_momentum: Tensor | None = None,
    bound: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Weights, Weights]:
    """`read_write` on plain tensors."""
    batch, heads, length = rate.shape
    size = min(chunk, length)
    chunks = -(-length // size)
    padding = chunks * size - length
    dtype = weights[0].dtype

    inputs = (q, k, v, bound, log_keep, log_momentum, rate, *weights, *momentum, *recent, *units)
    learning = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)

    def chunked(x: Tensor, before: Tensor | None = None) -> Tensor:
        """(B, H, T, ...) -> (N, R, b, ...), after those before each chunk where `before` is given."""
        if padding:
            x = torch.cat([x, x.new_zeros(batch, heads, padding, *x.shape[3:])], dim=2)
        if before is None:
            x = rearrange(x, "B H (N b) ... -> N (B H) b ...", b=size)
        else:
            x = torch.cat([before.to(x.dtype), x], dim=2)
            x = x.unfold(2, before.shape[2] + size, size).movedim(-1, 3)
            x = rearrange(x, "B H N b ... -> N (B H) b ...")
        # The backward pass takes chunks together, without it each stands alone.
        return x.contiguous() if learning else x

    with torch.autocast(q.device.type, enabled=False):
        if padding and mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        if mask is not None:
            rate = rate.masked_fill(~mask.unsqueeze(1), 0)
        before: list[Tensor | None] = [*recent, *[None] * (4 - len(recent))]
        k_before, v_before, rate_before, bound_before = before
        given = [
            (q, None),
            (k, k_before),
            (v, v_before),
            (bound, bound_before),
            (log_keep, None),
            (log_momentum, None),
            (rate, rate_before),
        ]
        tokens = [None if x is None else chunked(x.to(dtype), old) for x, old in given]
        parts = 2 if momentum else 1
        halves = zip(weights, momentum, strict=True) if momentum else zip(weights, strict=True)
        states = [
            rearrange(torch.cat([w.to(dtype) for w in pair], dim=2), "B H n m -> (B H) n m")
            for pair in halves
        ]
        units = [unit.to(dtype).flatten() for unit in units]
        if mask is not None:
            mask = chunked(mask.unsqueeze(1).expand(batch, heads, length))
        group = GROUP if q.device.type == "cpu" else chunks
        groups = -(-chunks // group)
        split = [(None,) * groups if x is None else x.split(group) for x in (*tokens, mask)]
        outputs = []
        for q, k, v, bound, log_keep, log_momentum, rate, real in zip(*split, strict=True):
            gates = log_keep, log_momentum, rate, real
            if not rule.linear:
                y, states = read_write_chunks(limit, rule, q, k, v, bound, *gates, states, units)
                outputs.append(y)
                continue
            decay = decays(*gates, rule.window)
            if learning:
                y, *states = _ReadWrite.apply(limit, rule, q, k, v, bound, *decay, *states, *units)
            else:
                y = _advanced(limit, rule, q, k, v, bound, decay, states, units)
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        y = rearrange(y, "N (B H) b m -> B H (N b) m", H=heads)[:, :, :length]
        split_states = [
            rearrange(s, "(B H) (part n) m -> part B H n m", H=heads, part=parts) for s in states
        ]
        # Copies, so that a state neither shares storage nor keeps that of all chunks.
        new = [
            tuple(s[i].clone(memory_format=torch.contiguous_format) for s in split_states)
            for i in range(parts)
        ]
        return y, new[0], new[1] if momentum else ()


class _Layer(NamedTuple):
    """What one layer leaves for the backward pass.

    states (N + 1, R, P n, m): [W; S], or W alone, where each chunk starts, and at the end. keys
    (N, R, b, n) and queries (N R, b, n): what enters the layer; scores (N R, b, b): their products. errors
    (N, R, b, m): gradient of the loss wrt what leaves it. Below the last layer: kept (N, R, b, m) and
    query_kept (N R, b, m), what the activation keeps of what leaves it; returned (N, R, b, .): the next
    layer's errors, back through its weights. When clipping: key_norms, error_norms (N, R, b). With a
    retention: scale (N, R, 1, 1), the weights over W. What a layer does not have is empty.
    """

    states: Tensor
    keys: Tensor
    queries: Tensor
    scores: Tensor
    errors: Tensor
    kept: Tensor
    query_kept: Tensor
    returned: Tensor
    key_norms: Tensor
    error_norms: Tensor
    scale: Tensor

    @property
    def scales(self) -> Tensor | None:
        """(N R, 1, 1), None without a retention."""
        return self.scale.flatten(0, 1) if self.scale.numel() else None


class _Made(NamedTuple):
    """What a forward pass leaves for the backward pass: clipping factors (N, R, b), M(k) (N, R, b, m) where
    the rule is not plain, else empty, and what each layer leaves.
    """

    clip: Tensor
    told: Tensor
    layers: Sequence[_Layer]


def _pair(x: Tensor, factors: Tensor) -> Tensor:
    """x times each of the P factors: (..., b, n), (..., b, P) -> (..., b, P n)."""
    n, parts = x.shape[-1], factors.shape[-1]
    out = x.new_empty(*x.shape[:-1], parts * n)
    for i in range(parts):
        torch.mul(x, factors[..., i : i + 1], out=out[..., i * n : (i + 1) * n])
    return out


def _errors(
    rule: Rule,
    v: Tensor,
    bound: Tensor | None,
    weight: Sequence[Tensor],
    x: Sequence[Tensor],
    error: Sequence[Tensor],
    kept: Sequence[Tensor],
    returned: Sequence[Tensor],
    told: Tensor,
) -> None:
    """One chunk's errors at `weight` (R, n, m) per layer: fills all that is named after `weight`, but x[0].

    As `_Layer` has them, without N: x (R, b, n) what enters a layer, error (R, b, m), below the last layer
    kept and returned, and `told` as in `_Made`.
    """
    last = len(weight) - 1
    for j in range(last):
        rule.activation.features(torch.bmm(x[j], weight[j]), kept[j], x[j + 1])
    if rule.plain:
        torch.baddbmm(v, x[last], weight[last], beta=-2, alpha=2, out=error[last])
    else:
        torch.bmm(x[last], weight[last], out=told)
        error[last].copy_(rule.gradient(told, v, bound))
    for j in reversed(range(last)):
        back = torch.bmm(error[j + 1], weight[j + 1].mT, out=returned[j])
        rule.activation.back(kept[j], x[j + 1], back, out=error[j])


def _clipping(
    limit: float,
    x: Sequence[Tensor],
    error: Sequence[Tensor],
    norms: Sequence[tuple[Tensor, Tensor]],
    out: Tensor,
) -> None:
    """Minus the factors (R, b) that cut each token's gradient to `limit`; fills `norms` of x and error."""
    total: Tensor | None = None
    for a, b, (key_norms, error_norms) in zip(x, error, norms, strict=True):
        product = torch.linalg.vector_norm(a, dim=-1, out=key_norms) * torch.linalg.vector_norm(
            b, dim=-1, out=error_norms
        )
        total = product if total is None else torch.hypot(total, product, out=total)
    assert total is not None
    torch.mul(total.reciprocal_(), -limit, out=out).clamp_(min=-1)


def _advance(
    state: Tensor,
    new: Tensor,
    x: Tensor,
    error: Tensor,
    gains: Tensor,
    closing: Tensor,
    carry: Tensor,
) -> None:
    """The next chunk's [W; S] (R, P n, m) into `new`, which may be `state`.

    gains (R, P), closing (R, b, P) and carry (R,) are those of the chunk's end.
    """
    n, parts = x.shape[-1], gains.shape[-1]
    share = gains[..., None, None]
    torch.mul(state[:, :n], share[:, 0], out=new[:, :n])
    if parts == 2:
        old_momentum = state[:, n:]
        new[:, :n].addcmul_(old_momentum, share[:, 1])
        torch.mul(old_momentum, carry[:, None, None], out=new[:, n:])
    new.baddbmm_(_pair(x, closing).mT, error)


def _told(
    y: Tensor, gains: Tensor, mixing: Tensor, state: Tensor, x: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """What a layer says to queries y (R, b, n) token by token, (R, b, m), and the scores y x^T (R, b, b).

    mixing (R, b, b) has minus the clipping in it, so that all products are added.
    """
    scores = torch.bmm(y, x.mT)
    out = torch.bmm(_pair(y, gains), state)
    return out.baddbmm_(scores * mixing, error), scores


def _advanced(
    limit: float | None,
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: Tensor | None,
    decay: Decays,
    states: Sequence[Tensor],
    units: Sequence[Tensor],
) -> Tensor:
    """As `_forward` where no gradient is wanted: outputs alone, and `states` are moved in place.

    Every chunk works in the memory of the one before, which a cache still holds.
    """
    chunks, rows, size, _ = k.shape
    parts = decay.gains.shape[-1]
    widths = [s.shape[1] // parts for s in states]
    errors = [k.new_empty(rows, size, s.shape[2]) for s in states]
    kept = [torch.empty_like(e) for e in errors[:-1]]
    hidden = [k.new_empty(rows, size, n) for n in widths[1:]]
    returned = [torch.empty_like(h) for h in hidden]
    told = torch.empty_like(errors[-1])
    clip = k.new_full((rows, size), -1)
    norms = [(torch.empty_like(clip), torch.empty_like(clip)) for _ in states]
    weight = [s[:, :n] for s, n in zip(states, widths, strict=True)]
    outputs = q.new_empty(rows, chunks, q.shape[2], states[-1].shape[2])
    for i in range(chunks):
        held, scales = weight, None
        if rule.scaling is not None:
            scales = [rule.scaling.scale(w, unit) for w, unit in zip(weight, units, strict=True)]
            held = [w * scale for w, scale in zip(weight, scales, strict=True)]
        x = [k[i], *hidden]
        own = None if bound is None else bound[i]
        _errors(rule, v[i], own, held, x, errors, kept, returned, told)
        if limit is not None:
            _clipping(limit, x, errors, norms, out=clip)
        mixing, y = decay.mixing[i] * clip.unsqueeze(-2), q[i]
        for j, state in enumerate(states):
            y, _ = _told(y, decay.gains[i], mixing, state, x[j], errors[j])
            if scales is not None:
                y.mul_(scales[j])
            if j < len(states) - 1:
                _, y = rule.activation.read(y)
        outputs[:, i] = y
        closing = decay.closing[i] * clip.unsqueeze(-1)
        for state, entered, error in zip(states, x, errors, strict=True):
            ends = decay.gains[i, :, -1], closing, decay.carry[i]
            _advance(state, state, entered, error, *ends)
    return outputs.transpose(0, 1)


def _forward(
    limit: float | None,
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: Tensor | None,
    decay: Decays,
    initial: Sequence[Tensor],
    units: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], _Made]:
    """Chunks (N, R, b, n) from states (R, P n, m), units (R,) of each layer, or none: outputs, states, what
    the backward pass needs.
    """
    chunks, rows, size, _ = k.shape
    last = len(initial) - 1
    every = range(last + 1)
    parts = decay.gains.shape[-1]
    widths = [s.shape[1] // parts for s in initial]
    act, retention = rule.activation, rule.scaling

    states = [s.new_empty(chunks + 1, *s.shape) for s in initial]
    for stack, s in zip(states, initial, strict=True):
        stack[0].copy_(s)
    errors = [k.new_empty(chunks, rows, size, s.shape[2]) for s in initial]
    kept = [torch.empty_like(e) for e in errors[:-1]]
    hidden = [k.new_empty(chunks, rows, size, n) for n in widths[1:]]
    returned = [torch.empty_like(h) for h in hidden]
    nothing = k.new_empty(0)
    scales = [nothing if retention is None else k.new_empty(chunks, rows, 1, 1) for _ in every]
    told = nothing if rule.plain else torch.empty_like(errors[last])
    keys = [k, *hidden]
    # Minus the clipping factor: with the sign in the matrices all products are added.
    clip = k.new_full((chunks, rows, size), -1)
    norms = []
    if limit is not None:
        norms = [(torch.empty_like(clip), torch.empty_like(clip)) for _ in every]

    for i in range(chunks):
        state = [s[i] for s in states]
        weight = [s[:, :n] for s, n in zip(state, widths, strict=True)]
        if retention is not None:
            for held, unit, scale in zip(weight, units, scales, strict=True):
                scale[i].copy_(retention.scale(held, unit))
            weight = [held * scale[i] for held, scale in zip(weight, scales, strict=True)]
        x = [key[i] for key in keys]
        error = [e[i] for e in errors]
        own = None if bound is None else bound[i]
        between = [z[i] for z in kept], [h[i] for h in returned]
        _errors(rule, v[i], own, weight, x, error, *between, told if rule.plain else told[i])
        if limit is not None:
            _clipping(limit, x, error, [(a[i], b[i]) for a, b in norms], out=clip[i])
        closing = decay.closing[i] * clip[i].unsqueeze(-1)
        for j in every:
            ends = decay.gains[i, :, -1], closing, decay.carry[i]
            _advance(state[j], states[j][i + 1], x[j], error[j], *ends)

    mixing = (decay.mixing * clip.unsqueeze(-2)).flatten(0, 1)
    gains = decay.gains.flatten(0, 1)
    y = q.flatten(0, 1)
    layers = []
    for j in every:
        read_from = states[j][:-1].flatten(0, 1), keys[j].flatten(0, 1), errors[j].flatten(0, 1)
        out, scores = _told(y, gains, mixing, *read_from)
        if retention is not None:
            out.mul_(scales[j].flatten(0, 1))
        entered, inner = y, (nothing,) * 3
        if j < last:
            query_kept, y = act.read(out)
            inner = kept[j], query_kept, returned[j]
        clipped = norms[j] if norms else (nothing,) * 2
        layers.append(
            _Layer(states[j], keys[j], entered, scores, errors[j], *inner, *clipped, scales[j])
        )
    y = out.view(chunks, rows, q.shape[2], -1)
    return y, [s[-1] for s in states], _Made(clip, told, layers)


class _ReadGrads(NamedTuple):
    """Gradients that reads alone bring; those of `mixing` are wrt it with the clipping in it.

    q (N R, b, n), mixing (N, R, b, b), gains (N, R, b, P), and per layer states (N + 1, R, P n, m), whose
    last is left open, keys and errors (N, R, b, .), scales (N, R) where there are any.
    """

    q: Tensor
    mixing: Tensor
    gains: Tensor
    states: list[Tensor]
    keys: list[Tensor]
    errors: list[Tensor]
    scales: list[Tensor]


def _back_reads(d_y: Tensor, rule: Rule, decay: Decays, made: _Made) -> _ReadGrads:
    """Back through the reads of all chunks; they need nothing from the chunks after them."""
    gains = decay.gains.flatten(0, 1)
    mixing = (decay.mixing * made.clip.unsqueeze(-2)).flatten(0, 1)
    d_gains, d_mixing = torch.zeros_like(gains), torch.zeros_like(mixing)
    d_states, d_keys, d_errors, d_scales = [], [], [], []
    d_out = rearrange(d_y, "N R b m -> (N R) b m")
    for j, layer in reversed(list(enumerate(made.layers))):
        x, n, scales = layer.queries, layer.queries.shape[-1], layer.scales
        if scales is not None:
            d_out = d_out * scales
        d_states.append(torch.empty_like(layer.states))
        torch.bmm(_pair(x, gains).mT, d_out, out=d_states[-1][:-1].flatten(0, 1))
        d_errors.append(torch.bmm((layer.scores * mixing).mT, d_out).view_as(layer.errors))
        if scales is not None:
            # The product that was scaled is linear in the states and errors together.
            by_states = (d_states[-1][:-1] * layer.states[:-1]).sum(dim=(2, 3))
            by_errors = (d_errors[-1] * layer.errors).sum(dim=(2, 3))
            d_scales.append((by_states + by_errors) / layer.scale[:, :, 0, 0])
        d_mixed = torch.bmm(d_out, layer.errors.flatten(0, 1).mT)
        d_mixing.addcmul_(d_mixed, layer.scores)
        d_scores = d_mixed.mul_(mixing)
        d_keys.append(torch.bmm(d_scores.mT, x).view_as(layer.keys))
        d_x = torch.bmm(d_scores, layer.keys.flatten(0, 1))
        by_states = torch.bmm(d_out, layer.states[:-1].flatten(0, 1).mT)
        for i, by_part in enumerate(by_states.split(n, -1)):
            d_gains[..., i].add_((by_part * x).sum(dim=-1))
            d_x.addcmul_(by_part, gains[..., i : i + 1])
        if j:
            kept = made.layers[j - 1].query_kept
            d_out = torch.empty_like(kept)
            rule.activation.back(kept, x, d_x, out=d_out)
    return _ReadGrads(
        d_x,
        d_mixing.view_as(decay.mixing),
        d_gains.view_as(decay.gains),
        d_states[::-1],
        d_keys[::-1],
        d_errors[::-1],
        d_scales[::-1],
    )


def _back_writes(
    limit: float | None,
    rule: Rule,
    v: Tensor,
    bound: Tensor | None,
    decay: Decays,
    made: _Made,
    units: Sequence[Tensor],
    grads: _ReadGrads,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, list[Tensor]]:
    """Back through the writes, last chunk first: adds to `grads`, leaving there the inputs' gradients.

    Returns those of `v`, of `bound`, of `closing`, with the clipping in it, of `carry`, and of `units`. On
    entry the last of grads.states is the final states' gradient.
    """
    clip, told, layers = made
    chunks, rows, size = clip.shape
    last = len(layers) - 1
    every = range(last + 1)
    parts = decay.gains.shape[-1]
    widths = [layer.keys.shape[-1] for layer in layers]
    closing = decay.closing * clip.unsqueeze(-1)
    d_closing, d_carry = torch.empty_like(closing), torch.zeros_like(decay.carry)
    d_v = torch.empty_like(grads.errors[-1])
    d_bound = None if bound is None else torch.empty_like(bound)
    d_units = [torch.zeros_like(unit) for unit in units]
    act, retention = rule.activation, rule.scaling
    curves = [
        act.curves(below.kept, above.keys, below.returned)
        for below, above in itertools.pairwise(layers)
    ]
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
        held = [s[:, :n] for s, n in zip(state, widths, strict=True)]
        weight = held
        if retention is not None:
            weight = [w * layer.scale[i] for w, layer in zip(held, layers, strict=True)]
        x = [layer.keys[i] for layer in layers]
        error = [layer.errors[i] for layer in layers]
        curve = [tuple(c[i] for c in one) for one in curves]

        # new = [kept W + added S; carry S] + [x c_1, x c_2]^T error
        share = closing[i]
        d_share = torch.zeros_like(share)
        d_ends = share.new_zeros(rows, parts, parts)
        for j, n in enumerate(widths):
            d_error[j].baddbmm_(_pair(x[j], share), d_new[j])
            d_pair = torch.bmm(error[j], d_new[j].mT)
            d_share.add_((d_pair.view(rows, size, parts, n) * x[j].unsqueeze(-2)).sum(dim=-1))
            for part in range(parts):
                d_x[j].addcmul_(d_pair[..., part * n : (part + 1) * n], share[..., part : part + 1])
            d_ends.baddbmm_(d_new[j].view(rows, parts, -1), state[j].view(rows, parts, -1).mT)
        grads.gains[i, :, -1].add_(d_ends[:, 0])
        if parts == 2:
            d_carry[i].copy_(d_ends[:, 1, 1])
        d_closing[i].copy_(d_share)

        if limit is not None:
            bitten = torch.linalg.vecdot(d_share, decay.closing[i]).add_(d_clip[i])
            for j in every:
                d_error[j].addcmul_(error[j], (by_key[j][i] * bitten).unsqueeze(-1))
                d_x[j].addcmul_(x[j], (by_error[j][i] * bitten).unsqueeze(-1))

        # Errors back through activations and weights, first layer first since it was made last.
        d_z, d_weight = [], []
        for j in range(last):
            d_back, bent = act.twice(curve[j], d_error[j])
            d_z.append(bent)
            d_error[j + 1].baddbmm_(d_back, weight[j + 1])
            d_weight.append(torch.bmm(d_back.mT, error[j + 1]))

        # The last error is the rule's gradient; then down the key's own way up.
        if rule.plain:
            d_z.append(d_error[last].mul_(2))
            torch.neg(d_z[last], out=d_v[i])
        else:
            own = None if bound is None else bound[i]
            by_told, by_v, by_bound = rule.twice(told[i], v[i], own, d_error[last])
            d_z.append(by_told)
            d_v[i].copy_(by_v)
            if d_bound is not None and by_bound is not None:
                d_bound[i].copy_(by_bound)
        gains, carry = decay.gains[i, :, -1, :, None, None], decay.carry[i, :, None, None]
        for j in reversed(every):
            n = widths[j]
            if j < last:
                act.add_back(curve[j], d_x[j + 1], into=d_z[j])
            d_x[j].baddbmm_(d_z[j], weight[j].mT)
            if j:
                d_w = d_weight[j - 1].baddbmm_(x[j].mT, d_z[j])
            else:
                d_w = torch.bmm(x[j].mT, d_z[j])
            if retention is not None:
                scale = layers[j].scale[i]
                d_scale = grads.scales[j][i] + (d_w * held[j]).sum(dim=(1, 2))
                by_held, by_unit = retention.back(held[j], units[j], scale, d_scale)
                d_w = by_held.addcmul_(d_w, scale)
                d_units[j].add_(by_unit)
            new_weights, here = d_new[j][:, :n], grads.states[j][i]
            here[:, :n].add_(d_w.addcmul_(new_weights, gains[:, 0]))
            if parts == 2:
                new_momentum = d_new[j][:, n:]
                here[:, n:].addcmul_(new_weights, gains[:, 1]).addcmul_(new_momentum, carry)
    return d_v, d_bound, d_closing, d_carry, d_units


class _ReadWrite(torch.autograd.Function):
    """`_forward` with its gradient."""

    @staticmethod
    def forward(ctx: Any, limit: float | None, rule: Rule, *inputs: Tensor) -> tuple[Tensor, ...]:
        q, k, v, bound = inputs[:4]
        decay, rest = Decays(*inputs[4:8]), inputs[8:]
        ctx.layers = len(rest) if rule.scaling is None else len(rest) // 2
        units = rest[ctx.layers :]
        y, states, made = _forward(limit, rule, q, k, v, bound, decay, rest[: ctx.layers], units)
        ctx.limit, ctx.rule = limit, rule
        kept = (x for layer in made.layers for x in layer)
        # v says nothing to a gradient that is plain.
        saved = v if not rule.plain else v.new_empty(0)
        ctx.save_for_backward(saved, bound, *decay, made.clip, made.told, *kept, *units)
        return y, *states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor, *d_states: Tensor) -> tuple[Tensor | None, ...]:
        v, bound, *saved = ctx.saved_tensors
        decay, (clip, told), saved = Decays(*saved[:4]), saved[4:6], saved[6:]
        fields = len(_Layer._fields)
        layers = [_Layer(*saved[i * fields : (i + 1) * fields]) for i in range(ctx.layers)]
        units = saved[ctx.layers * fields :]
        made = _Made(clip, told, layers)
        with torch.autocast(d_y.device.type, enabled=False):
            grads = _back_reads(d_y, ctx.rule, decay, made)
            for stack, d in zip(grads.states, d_states, strict=True):
                stack[-1].copy_(d)
            d_v, d_bound, d_closing, d_carry, d_units = _back_writes(
                ctx.limit, ctx.rule, v, bound, decay, made, units, grads
            )
            return (
                None,
                None,
                grads.q.view(*d_y.shape[:3], -1),
                grads.keys[0],
                d_v,
                d_bound,
                grads.mixing.mul_(clip.unsqueeze(-2)),
                grads.gains,
                d_closing.mul_(clip.unsqueeze(-1)),
                d_carry,
                *(d[0] for d in grads.states),
                *d_units,
            )
