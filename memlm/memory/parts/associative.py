"""Associations of keys with values, as sums of outer products, head by head.

P features of all heads H together, p = P / H of each; D values of all heads, d = D / H. associations
(B, p, D): those of head h are the columns from h d on; normaliser (B, P): the keys that were counted, one
head after the other, or () where nothing is divided by it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.memory.parts.feature_maps import dpfp
from memlm.memory.parts.precision import without_autocast

EPSILON = 1e-5

Normaliser = Tensor | tuple[()]


def features_of(x: Tensor, heads: int, nu: int, unit: bool) -> Tensor:
    """DPFP features of each head: (B, T, H n) -> (B, T, H, 2 nu n); unit: of length 1, or zero."""
    phi = dpfp(x.unsqueeze(-2) if heads == 1 else x.unflatten(-1, (heads, -1)), nu)
    return F.normalize(phi, dim=-1) if unit else phi


def associated(phi: Tensor, associations: Tensor) -> Tensor:
    """The sum of values that features (B, T, H, p) point to, in their dtype: (B, T, H, d)."""
    # Neither by einsum nor by matmul, which cost more than the product where it is small, as for a single
    # new token.
    heads = phi.shape[2]
    if heads == 1:
        return torch.bmm(phi.squeeze(2), associations.to(phi.dtype)).unsqueeze(2)
    by_head = associations.to(phi.dtype).unflatten(2, (heads, -1))
    return (phi.transpose(1, 2) @ by_head.transpose(1, 2)).transpose(1, 2)


def counted(phi: Tensor, normaliser: Tensor) -> Tensor:
    """How often features (B, T, H, p) are counted, in the normaliser's dtype: (B, T, H)."""
    wide = phi.to(normaliser.dtype)
    heads = phi.shape[2]
    if heads == 1:
        return torch.bmm(wide.squeeze(2), normaliser.unsqueeze(2))
    by_head = normaliser.unflatten(1, (heads, -1)).unsqueeze(3)
    return (wide.transpose(1, 2) @ by_head).squeeze(3).transpose(1, 2)


def summed(phi: Tensor, associations: Tensor, normaliser: Normaliser) -> Tensor:
    """What features (B, T, H, p) recall without a denominator, (B, T, D)."""
    return associated(phi, associations).flatten(2)


def averaged(phi: Tensor, associations: Tensor, normaliser: Normaliser) -> Tensor:
    """What they recall divided by how often they are counted, (B, T, D).

    The quotient alone is wide: in bfloat16 a sum over P features would lose the epsilon.
    """
    assert isinstance(normaliser, Tensor)
    with without_autocast(phi.device.type):
        if phi.shape[2] == 1:
            # The same as below without the views of heads, each of which costs a new token a call.
            found = phi.squeeze(2)
            share = torch.bmm(found.to(normaliser.dtype), normaliser.unsqueeze(2)) + EPSILON
            return torch.bmm(found, associations.to(phi.dtype)) / share
        share = counted(phi, normaliser).unsqueeze(-1) + EPSILON
        return (associated(phi, associations) / share).flatten(2)


def outer_products(phi: Tensor, values: Tensor) -> Tensor:
    """The sum over tokens of features (B, M, H, p) times values (B, M, D), as associations."""
    by_head = values.unflatten(2, (phi.shape[2], -1))
    return torch.einsum("bmhp,bmhd->bphd", phi, by_head).flatten(2)


def uncounted(phi: Tensor, normaliser: Tensor) -> Tensor:
    """How much of each key (B, M, H, p) the normaliser does not count yet, (B, M, H); no gradient."""
    with torch.no_grad():
        missing = 1 - (counted(phi, normaliser) + EPSILON) / (phi.square().sum(dim=-1) + EPSILON)
        # An empty normaliser counts nothing, so that a first segment is written whole.
        empty = (normaliser.unflatten(1, (phi.shape[2], -1)) == 0).all(dim=-1).unsqueeze(1)
        return torch.where(empty, 1.0, missing.clamp(0, 1))
