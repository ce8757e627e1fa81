"""A linear model that is trained while it is asked, f(x) = x + LN(x W + b), one mini-batch at a time.

The dual form of TTT-Linear (Sun et al. 2024, *Learning to (Learn at Test Time)*, section 2.5).

Legend: N mini-batches, C tokens of one, R rows times heads, d head size.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6
ROTARY_BASE = 10_000.0


class LinearModel(NamedTuple):
    """W (B, H, d, d) and b (B, H, 1, d) of every row and head, or what is to be taken from them."""

    weight: Tensor
    bias: Tensor

    def joined(self) -> Tensor:
        """(R, d + 1, d): b is a row of W, which a 1 beside every key meets."""
        return torch.cat([*self], dim=2).flatten(0, 1)

    @classmethod
    def apart(cls, joined: Tensor, heads: int) -> Self:
        """The model that was `joined`."""
        both = joined.unflatten(0, (-1, heads)).split([joined.shape[1] - 1, 1], dim=2)
        return cls(*(one.contiguous() for one in both))


class Norm(NamedTuple):
    """Scale and shift (R, 1, d) of the layer norm LN."""

    weight: Tensor
    bias: Tensor


def told_in_mini_batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rate: Tensor,
    places: Tensor,
    full: Tensor,
    model: Tensor,
    steps: Tensor,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mini-batches in turn, in the dual form: what is said to their tokens (N, R, C, d), the model that the
    first one that is not full begins with, and the sum of the steps of its tokens.

    Token i teaches the model to give v_i - k_i back from k_i, with rate_i, and token t is answered after
    c_t times the steps of all i <= t are taken. q, k, v (N, R, C, d); rate (N, R, C, 1), zero where there
    is no token; places (C, 1): c. full (N, R, 1, 1): whether tokens fill the mini-batch, as they do those
    before it. model, steps (R, d + 1, d), joined: steps is the sum of those of the first mini-batch's
    tokens before these.
    """
    pull, square = (norm.bias - (v - k)) * norm.weight, norm.weight.square()
    q, k = (F.pad(x, (0, 1), value=1.0) for x in (q, k))
    # What needs no W is computed for all mini-batches together: a few products are left for each.
    taught, last = k * rate, places[-1] * full
    mixing, closing = (q @ k.mT).tril() * rate.mT * places, (taught * last).mT
    begun, said, slopes = model - last[0] * steps, [], []
    for asked, key, pulled, mixed, ending in zip(q, k, pull, mixing, closing, strict=True):
        slope = norm_slope(torch.bmm(key, model), pulled, square)
        said.append(torch.baddbmm(torch.bmm(asked, model), mixed, slope, alpha=-1))
        begun = model = torch.baddbmm(begun, ending, slope, alpha=-1)
        slopes.append(slope)
    said[0] = said[0] - places * torch.bmm(q[0], steps)
    unit = F.layer_norm(torch.stack(said), norm.weight.shape[-1:], eps=EPSILON)
    # The mini-batch that is left open, if one is.
    at = full.sum(dim=0, keepdim=True).clamp(max=len(q) - 1)
    left = [(x * ~full).take_along_dim(at, dim=0)[0] for x in (taught, torch.stack(slopes))]
    steps = torch.baddbmm(steps * ~full[0], left[0].mT, left[1])
    return q[..., :-1] + unit * norm.weight + norm.bias, model, steps


def norm_slope(z: Tensor, pull: Tensor, square: Tensor) -> Tensor:
    """The gradient of 1/2 || LN(z) - target ||^2 by z, all (R, C, d).

    LN(z) = u w + b, u the normed z: square is w^2, and pull (b - target) w.
    """
    size = z.shape[-1:]
    unit, mean, scale = torch.native_layer_norm(z, size, None, None, EPSILON)
    by_unit = torch.addcmul(pull, unit, square)
    back = torch.ops.aten.native_layer_norm_backward
    slope: Tensor = back(by_unit, z, size, mean, scale, None, None, [True, False, False])[0]
    return slope


def turned(x: Tensor) -> Tensor:
    """Queries or keys (..., C, d), rotated by their place in the mini-batch; d is even."""
    half = x.shape[-1] // 2
    step = torch.arange(half, device=x.device, dtype=x.dtype) / half
    places = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)
    angles = places.unsqueeze(-1) * ROTARY_BASE**-step
    cos, sin = (torch.cat([one, one], dim=-1) for one in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)
