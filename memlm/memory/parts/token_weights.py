"""A deep memory whose tokens have weights of their own: where those are not linear in the gradients.

`deep_memory` never makes a token's weights, since it can say what they do to a query by products of
queries and keys. That ends where weights are a softmax of what is held (Memora), or where momentum is made
orthogonal before it is added (Muon). Here they are made, (b, n, m) numbers for each row and layer: exact at
every token, and many times slower. Gradients are still taken at the chunk's start; with chunks of one token
that is the rule as printed. The backward pass is autograd's, and computes each chunk again.

Letters as in `deep_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memlm.memory.parts.decays import decays, gate_products, gradients_of
from memlm.memory.parts.memory_rules import Rule
from memlm.memory.parts.orthogonal import KELLER, orthogonal


class _Gradients(NamedTuple):
    """Of every layer, token by token: inputs (R, b, n) and errors (R, b, m), their outer products."""

    inputs: list[Tensor]
    errors: list[Tensor]

    def summed(self, shares: Tensor, onto: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Gradients in these shares (R, t, b), added to `onto` where given: (R, t, n, m) for each layer.

        `onto` is overwritten where no gradient is wanted.
        """
        found = []
        for j, (x, error) in enumerate(zip(self.inputs, self.errors, strict=True)):
            # Shares go to the inputs: no token's outer product is made by itself.
            shared = (x.mT.contiguous().unsqueeze(1) * shares.unsqueeze(2)).flatten(1, 2)
            if onto is None:
                total = torch.bmm(shared, error)
            else:
                add = torch.baddbmm if torch.is_grad_enabled() else Tensor.baddbmm_
                total = add(onto[j].flatten(1, 2), shared, error)
            found.append(total.unflatten(1, (shares.shape[1], x.shape[-1])))
        return found


def read_write_chunks(
    limit: float | None,
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: Tensor | None,
    log_keep: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    mask: Tensor | None,
    states: Sequence[Tensor],
    units: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """Chunks (N, R, b, .) from states (R, P n, m), the first n of them what is held: outputs and states."""
    optional = [bound, log_momentum, mask]
    outputs, held = [], list(states)
    # Where no gradient is wanted, every chunk's weights stand where those of the one before stood.
    room: list[Tensor] = []
    if not (torch.is_grad_enabled() or rule.muon):
        parts = 1 if log_momentum is None else 2
        rows, tokens = log_keep.shape[1:]
        room = [s.new_empty(rows, tokens, s.shape[1] // parts, s.shape[2]) for s in states]
    for i in range(len(q)):
        own, momentum, real = (None if x is None else x[i] for x in optional)
        given = (q[i], k[i], v[i], own, log_keep[i], momentum, rate[i], real, held, units, room)
        if torch.is_grad_enabled():
            # Computed again in the backward pass: of all chunks' weights no more are kept than their first.
            y, held = checkpoint(
                _chunk, limit, rule, *given, use_reentrant=False, preserve_rng_state=False
            )
        else:
            y, held = _chunk(limit, rule, *given)
        outputs.append(y)
    return torch.stack(outputs), held


def _chunk(
    limit: float | None,
    rule: Rule,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bound: Tensor | None,
    log_keep: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    mask: Tensor | None,
    states: Sequence[Tensor],
    units: Sequence[Tensor],
    room: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """One chunk. room: per layer (R, b, n, m) to be filled with its tokens' weights, where there is any."""
    parts = 1 if log_momentum is None else 2
    halves = [s.chunk(parts, dim=1) for s in states]
    held = [half[0] for half in halves]
    carried = [half[1] for half in halves] if parts == 2 else []
    makers = rule.makers(held, units)
    start = [make(w) for make, w in zip(makers, held, strict=True)]
    gradients = _clipped(limit, _gradients(rule, k, v, bound, start))
    advance = _orthogonal_steps if rule.muon else partial(_steps, room=room)
    tokens, ending = advance(gradients, log_keep, log_momentum, rate, mask, held, carried, rule)
    # Copied before shaping overwrites them, and the next chunk.
    last = [w[:, -1] for w in tokens]
    after = [torch.cat(pair, dim=1) for pair in zip(last, *[ending] * (parts - 1), strict=True)]
    y = q
    for j, (make, w) in enumerate(zip(makers, tokens, strict=True)):
        # What enters is multiplied, not the weights of every token.
        shaped, divisor = make.shape(w, bool(room))
        y = ((y * make.factor).unsqueeze(-2) @ shaped).squeeze(-2)
        y = y if divisor is None else y / divisor
        y = rule.activation.of(y) if j < len(makers) - 1 else y
    return y, after


def _gradients(
    rule: Rule, k: Tensor, v: Tensor, bound: Tensor | None, weights: Sequence[Tensor]
) -> _Gradients:
    """What every token's error asks of the layers, at these weights (R, n, m)."""
    inputs, entered = [k], []
    for w in weights[:-1]:
        entered.append(inputs[-1] @ w)
        inputs.append(rule.activation.of(entered[-1]))
    errors = [rule.gradient(inputs[-1] @ weights[-1], v, bound)]
    for z, w in zip(reversed(entered), reversed(weights[1:]), strict=True):
        errors.append(rule.activation.pull(z, errors[-1] @ w.mT))
    return _Gradients(inputs, errors[::-1])


def _clipped(limit: float | None, gradients: _Gradients) -> _Gradients:
    """Each token's gradient cut to the norm `limit`, over all layers together."""
    if limit is None:
        return gradients
    squares = [
        x.square().sum(dim=-1) * error.square().sum(dim=-1)
        for x, error in zip(*gradients, strict=True)
    ]
    factor = limit * torch.stack(squares).sum(dim=0).clamp(min=limit**2).rsqrt()
    return gradients._replace(errors=[error * factor.unsqueeze(-1) for error in gradients.errors])


Held = Sequence[Tensor]


def _steps(
    gradients: _Gradients,
    log_keep: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    mask: Tensor | None,
    held: Held,
    carried: Held,
    rule: Rule,
    room: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """What is held at every token (R, b, n, m), and the momentum at the end (R, n, m), if there is one."""
    decay = decays(log_keep, log_momentum, rate, mask, rule.window)
    first = decay.gains[..., 0, None, None]
    if room:
        kept = [
            torch.mul(first, w.unsqueeze(1), out=out) for w, out in zip(held, room, strict=True)
        ]
    else:
        kept = [first * w.unsqueeze(1) for w in held]
    if carried:
        second = decay.gains[..., 1, None, None]
        kept = [
            torch.addcmul(t, second, s.unsqueeze(1)) for t, s in zip(kept, carried, strict=True)
        ]
    tokens = gradients.summed(-decay.mixing, kept)
    if not carried:
        return tokens, []
    left = decay.carry[:, None, None]
    added = gradients.summed(decay.closing[..., 1].unsqueeze(-2))
    return tokens, [left * s - step.squeeze(1) for s, step in zip(carried, added, strict=True)]


def _orthogonal_steps(
    gradients: _Gradients,
    log_keep: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    mask: Tensor | None,
    held: Held,
    carried: Held,
    rule: Rule,
) -> tuple[list[Tensor], list[Tensor]]:
    """As `_steps`, where each token's momentum is made orthogonal before it is added, times its rate."""
    assert log_momentum is not None
    if mask is not None:
        blank = ~mask
        log_keep, log_momentum = (x.masked_fill(blank, 0) for x in (log_keep, log_momentum))
    kept, keep = gate_products(log_keep)
    left, momentum = gate_products(log_momentum)
    if mask is not None:
        keep, momentum = (x.masked_fill(blank.unsqueeze(-2), 0) for x in (keep, momentum))
    shares = gradients_of(momentum, rule.window) * rate.unsqueeze(-2)
    own = keep * rate[..., None, -log_keep.shape[-1] :]
    tokens, ending = [], []
    for w, s, step in zip(held, carried, gradients.summed(shares), strict=True):
        moved = left[..., None, None] * s.unsqueeze(1) - step
        added = own @ orthogonal(moved, KELLER).flatten(2)
        tokens.append(kept[..., None, None] * w.unsqueeze(1) + added.unflatten(2, w.shape[1:]))
        ending.append(moved[:, -1])
    return tokens, ending
