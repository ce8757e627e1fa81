"""What the gates of a chunk come to: how much of each step, and of each gradient, is left at a later token.

Letters as in `deep_memory`: b tokens of a chunk, c of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# exp(-40) is nothing next to 1, in float64 too. Deeper logs would cost their neighbours in the same running
# sum digits, and a gate of exactly zero would make inf - inf.
LEAST_LOG = -40.0


class Decays(NamedTuple):
    """What the gates of a chunk come to: everything after it is linear in these.

    mixing (..., b, i): share of the gradient at i in the weights at t, to be subtracted. gains (..., b, 2):
    shares of the first weights and first momentum in the weights at t. closing (..., i, 2): shares of the
    gradient at i in the next chunk's weights and momentum. carry (...): of the first momentum in the next.
    Without momentum gains and closing have one share, and carry says nothing. Tokens i are the chunk's own,
    after the c - 1 before it where a window has c.
    """

    mixing: Tensor
    gains: Tensor
    closing: Tensor
    carry: Tensor


def decays(
    log_keep: Tensor,
    log_momentum: Tensor | None,
    rate: Tensor,
    mask: Tensor | None = None,
    window: int = 1,
) -> Decays:
    """From log(1 - alpha), log eta (..., b) and theta (..., b + window - 1), zero at padding.

    log_momentum: None without momentum. mask (..., b) bool, False for padding.
    """
    if mask is not None:
        blank = ~mask
        log_keep = log_keep.masked_fill(blank, 0)
        if log_momentum is not None:
            log_momentum = log_momentum.masked_fill(blank, 0)
    rate = rate.unsqueeze(-2)
    kept, keep = gate_products(log_keep)
    if mask is not None:
        keep = keep.masked_fill(blank.unsqueeze(-2), 0)  # nothing is added at a masked token
    if log_momentum is None:
        mixing = gradients_of(keep, window) * rate
        closing = mixing[..., -1, :, None]
        return Decays(mixing, kept.unsqueeze(-1), closing, torch.zeros_like(kept[..., -1]))
    carried, momentum = gate_products(log_momentum)
    if mask is not None and window > 1:
        momentum = momentum.masked_fill(blank.unsqueeze(-2), 0)
    mixing = gradients_of(keep @ momentum, window) * rate
    started = (keep @ carried.unsqueeze(-1)).squeeze(-1)
    ending = (gradients_of(momentum[..., -1:, :], window) * rate).squeeze(-2)
    return Decays(
        mixing,
        torch.stack([kept, started], dim=-1),
        torch.stack([mixing[..., -1, :], ending], dim=-1),
        carried[..., -1],
    )


def gradients_of(shares: Tensor, window: int) -> Tensor:
    """From shares of the steps at i (..., b) those of the gradients in them, (..., b + window - 1).

    A step takes the gradients of the last `window` tokens, each with as much of its rate.
    """
    if window == 1:
        return shares
    size = shares.shape[-1]
    band = shares.new_full((size, size + window - 1), 1 / window).triu_().tril_(window - 1)
    return shares @ band


def gate_products(log: Tensor) -> tuple[Tensor, Tensor]:
    """Products of gates: up to t (..., t), and after i up to t (..., t, i), 0 where i > t."""
    total = log.clamp_min(LEAST_LOG).cumsum(dim=-1)
    # Cut before exp as well: what lies after t grows without bound there, and 0 * inf is no gradient.
    spans = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril_().exp_()
    return total.exp(), spans.tril() if spans.requires_grad else spans.tril_()
