"""Feature maps that turn dot products into the kernel of a linear attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021, eq. 37). (..., d) -> (..., 2 nu d).

    r = [relu(x); relu(-x)]; features r_i * r_{i-j} for j = 1..nu: non-negative and sparse.
    """
    r = torch.cat([x, -x], dim=-1).relu()
    size = r.shape[-1]
    if not r.requires_grad:
        # Turned by j is nu + 1 copies read from (size - 1) j on: fewest calls, which is what a single new
        # token waits for. Backward through the views below is three times as fast.
        turned = torch.cat([r] * (nu + 1), dim=-1).unfold(-1, size, size - 1).narrow(-2, 1, nu)
        return (r.unsqueeze(-2) * turned).flatten(-2)
    turns = -(-nu // size)
    # With its end in front of it, r is its own past: views, where `roll` makes copies.
    past = torch.cat([r[..., -nu:] if turns == 1 else r.repeat(*[1] * (r.ndim - 1), turns), r], -1)
    front = past.shape[-1] - size
    shifted = [r * past[..., front - j : front - j + size] for j in range(1, nu + 1)]
    return torch.cat(shifted, dim=-1)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al. 2020, eq. 7), without the cancellation in exp(x) - 1 + 1."""
    return x.relu() + x.clamp(max=0).exp()


def quadratic(x: Tensor, shares: Tensor) -> Tensor:
    """`x` and all products of two of its numbers: (..., d) -> (..., d + d (d + 1) / 2), as long as `x`.

    Where x and y have length 1, features have the product a x.y + (1 - a) (x.y)^2, a the part of the
    squares of shares (..., 2) that the first has.
    """
    size = x.shape[-1]
    rows, columns = torch.triu_indices(size, size, device=x.device)
    # What stands beside the diagonal stands for two.
    weight = torch.where(rows == columns, x.new_ones(()), x.new_full((), 2**0.5))
    first, second = F.normalize(shares, dim=-1).split(1, dim=-1)
    scale = torch.cat([first.expand(*first.shape[:-1], size), second * weight], dim=-1)
    # A number times itself and those after it: several times as fast as to pick all pairs by their indices.
    pairs = [x[..., i : i + 1] * x[..., i:] for i in range(size)]
    return torch.cat([x, *pairs], dim=-1) * scale


# The length of the constant beside a half of length 1, and that of both together.
BESIDE, TOGETHER = 0.5**0.5, 1.5**0.5


def pair_product(x: Tensor) -> Tensor:
    """The outer product of the halves of `x`, normed, with a constant: (..., d) -> (..., (d / 2 + 1)^2).

    Of length 1. Two words that differ in one half only are then far apart (Schlag et al. 2021, *Learning
    Associative Inference Using Fast Weight Memory*, section 3). The constant keeps the halves
    themselves among the features, as in ATLAS's polynomials (Behrouz et al. 2025), for what is kept under
    one word alone.
    """
    first, second = (
        F.pad(F.normalize(half, dim=-1), (0, 1), value=BESIDE) / TOGETHER
        for half in x.chunk(2, dim=-1)
    )
    return (first.unsqueeze(-1) * second.unsqueeze(-2)).flatten(-2)
