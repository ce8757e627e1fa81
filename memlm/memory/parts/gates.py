"""Write gates that can be shut for good: what a memory holds then stays as it was, to the bit.

A sigmoid is never zero, and ten million tokens are forty thousand segments: no leak that it can
learn is small enough. The hard gate is a sigmoid stretched beyond 0 and 1 and cut there (Louizos et
al. 2018, *Learning Sparse Neural Networks through L0 Regularization*, section 2.2, without the
noise).
"""

from __future__ import annotations

import torch
from torch import Tensor

GATES = ("sigmoid", "hard")
# How far the hard gate reaches beyond 0 and 1 before it is cut.
STRETCH = 0.1


def open_gate(logit: Tensor, kind: str, threshold: float = 0.0) -> Tensor:
    """The gate at `logit`, from 0 to 1; what is below `threshold` is exactly 0.

    kind: "sigmoid", or "hard", which reaches both ends.
    """
    gate = torch.sigmoid(logit)
    if kind == "hard":
        gate = ((1 + 2 * STRETCH) * gate - STRETCH).clamp(0, 1)
    return torch.where(gate < threshold, 0.0, gate) if threshold else gate


def check_gate(kind: str, threshold: float) -> None:
    """Refuse a gate there is not. ValueError."""
    if kind not in GATES:
        raise ValueError(f"write_gate={kind!r} is unknown; use {' or '.join(map(repr, GATES))}")
    if not threshold >= 0:
        raise ValueError(
            f"write_threshold={threshold} must be at least 0; use 0 for none, or float('inf') for silence"
        )
