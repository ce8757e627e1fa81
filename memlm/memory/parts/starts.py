"""How parameters start that several memories have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memlm.memory.base import was_loaded


def start_output(weight: Tensor, std: float) -> None:
    """An output projection: normal, or zeros, so that the stage is as it was, where `std` is 0."""
    if std:
        nn.init.normal_(weight, std=std)
    else:
        nn.init.zeros_(weight)


def start_convolution(kernel: Tensor, std: float = 0.0) -> None:
    """A short convolution's taps (n, 1, size): normal, or the present token's alone where `std` is 0."""
    if std:
        nn.init.normal_(kernel, std=std)
        return
    nn.init.zeros_(kernel)
    if not was_loaded(kernel):
        with torch.no_grad():
            kernel[..., -1] = 1.0
