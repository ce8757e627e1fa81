"""Feature maps that turn dot products into the kernel of a linear attention."""

from __future__ import annotations

import torch
from torch import Tensor


def dpfp(x: Tensor, nu: int) -> Tensor:
    """Deterministic parameter-free projection (Schlag et al. 2021, eq. 37). (..., d) -> (..., 2 nu d).

    r = [relu(x); relu(-x)]; features r_i * r_{i-j} for j = 1..nu: non-negative and sparse.
    """
    r = torch.cat([x, -x], dim=-1).relu()
    size = r.shape[-1]
    turns = -(-nu // size)
    # With its end in front of it, r is its own past: views, where `roll` makes copies.
    past = torch.cat([r[..., -nu:] if turns == 1 else r.repeat(*[1] * (r.ndim - 1), turns), r], -1)
    front = past.shape[-1] - size
    shifted = [r * past[..., front - j : front - j + size] for j in range(1, nu + 1)]
    return torch.cat(shifted, dim=-1)


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 (Katharopoulos et al. 2020, eq. 7), without the cancellation in exp(x) - 1 + 1."""
    return x.relu() + x.clamp(max=0).exp()
