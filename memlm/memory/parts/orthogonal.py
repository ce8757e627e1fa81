"""Steps of equal size in every direction, by Newton-Schulz iterations (Muon)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = Sequence[tuple[float, float, float]]

# Added to the norm before it divides, as in LaCT's code.
EPSILON = 1e-7
# LaCT's five steps, each with its own.
LACT: Coefficients = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Muon's first, five times the same, which ATLAS takes.
KELLER: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5


def orthogonal(x: Tensor, coefficients: Coefficients = LACT) -> Tensor:
    """`x` (..., n, m) with singular values near 1, by a Newton-Schulz step for each of `coefficients`."""
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + EPSILON)
    for a, b, c in coefficients:
        products = x @ x.mT
        x = a * x + (b * products + c * products @ products) @ x
    return x if wide else x.mT
