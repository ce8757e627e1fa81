"""A linear model that is trained while it is asked, f(x) = x + LN(x W + b), one mini-batch at a time.

The dual form of TTT-Linear (Sun et al. 2024, *Learning to (Learn at Test Time)*, section 2.5).

Legend: C tokens of a mini-batch, d head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
ROTARY_BASE = 10_000.0


class LinearModel(NamedTuple):
    """W (B, H, d, d) and b (B, H, 1, d) of every row and head, or what is to be taken from them."""

    weight: Tensor
    bias: Tensor


class Norm(NamedTuple):
    """Scale and shift (H, 1, d) of the layer norm LN."""

    weight: Tensor
    bias: Tensor


def told_in_mini_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    places: Tensor,
    model: LinearModel,
    steps: LinearModel,
    norm: Norm,
) -> tuple[Tensor, LinearModel]:
    """One mini-batch in the dual form: what is said to its tokens (B, H, C, d), and the sum of its steps.

    Token i teaches `model` to give v_i - k_i back from k_i, with rate_i, and token t is answered after c_t
    times the steps of all i <= t are taken. q, k, v (B, H, C, d); rate (B, H, C, 1), zero where there is no
    token; places (C, 1): c. steps: the sum of those of the mini-batch's tokens before these.
    """
    slope = rate * norm_slope(k @ model.weight + model.bias, v - k, norm)
    # The 1 is b's share, which every step moves whatever is asked.
    taken = (q @ k.mT + 1).tril() @ slope + q @ steps.weight + steps.bias
    z = q @ model.weight + model.bias - places * taken
    said = q + F.layer_norm(z, z.shape[-1:], eps=EPSILON) * norm.weight + norm.bias
    return said, LinearModel(
        steps.weight + k.mT @ slope, steps.bias + slope.sum(dim=2, keepdim=True)
    )


def norm_slope(z: Tensor, target: Tensor, norm: Norm) -> Tensor:
    """The gradient of 1/2 || LN(z) - target ||^2 by z, all (B, H, C, d)."""
    centred = z - z.mean(dim=-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + EPSILON)
    unit = centred * scale
    g = (unit * norm.weight + norm.bias - target) * norm.weight
    along = (g * unit).mean(dim=-1, keepdim=True)
    return (g - g.mean(dim=-1, keepdim=True) - unit * along) * scale


def turned(x: Tensor) -> Tensor:
    """Queries or keys (..., C, d), rotated by their place in the mini-batch; d is even."""
    half = x.shape[-1] // 2
    step = torch.arange(half, device=x.device, dtype=x.dtype) / half
    places = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
    angles = places.unsqueeze(-1) * ROTARY_BASE**-step
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
