"""Memory that is vectors around each segment, read and written by the decoder itself."""

from __future__ import annotations

import torch
from torch import Tensor

from memlm.memory.base import Dims, Inner, MemoryConfig


def check_decoder_memory(name: str, config: MemoryConfig, dims: Dims) -> None:
    """Refuse layers, and a base whose hidden states are no embeddings (ValueError)."""
    if config.layers is not None:
        raise ValueError(
            f"layers={config.layers} has no meaning for {name}, which wraps the whole decoder; "
            "leave it out"
        )
    if dims.embedding_size != dims.hidden_size:
        raise ValueError(
            f"{name} feeds hidden states ({dims.hidden_size}) back as embeddings "
            f"({dims.embedding_size}), which this base keeps at another size; use memory='armt'"
        )


def around(
    before: Tensor, x: Tensor, after: Tensor | None, inner: Inner, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run `inner` on [before; x; after]: its outputs at x (B, T, D), and after it (B, n, D).

    before (B, m, D); after (B, n, D), None for nothing (n = 0); mask (B, T) as a memory gets it.
    """
    start, tokens = before.shape[1], x.shape[1]
    parts = [before, x] if after is None else [before, x, after]
    if mask is not None:
        mask = torch.cat(
            [mask if part is x else mask.new_ones(part.shape[:2]) for part in parts], dim=1
        )
    y = inner(torch.cat(parts, dim=1), mask=mask)
    return y[:, start : start + tokens], y[:, start + tokens :]
