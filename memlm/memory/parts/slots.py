"""Attention between the tokens of a segment and slots: learned or remembered vectors without a place.

N slots. Scores are computed in the open, which for a few slots costs no more than a fused kernel and works
under `torch.vmap`.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from memlm.memory.parts.starts import start_output


def scores_of(q: Tensor, k: Tensor, seen: Tensor | None) -> Tensor:
    """q (B, H, S, dh), k (B, H, N, dh): their products over sqrt(dh), -inf where `seen` (B, N) is False.

    A row that sees nothing sees everything: its softmax would be NaN, and what comes of it is thrown away.
    """
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if seen is None:
        return scores
    seen = seen | ~seen.any(dim=1, keepdim=True)
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


def in_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H dh) -> (B, H, N, dh)."""
    return rearrange(x, "b n (h d) -> b h n d", h=heads)


def out_of_heads(x: Tensor) -> Tensor:
    """(B, H, N, dh) -> (B, N, H dh)."""
    return rearrange(x, "b h n d -> b n (h d)")


class CrossAttention(nn.Module):
    """Softmax attention of vectors to other vectors, with projections of its own and no positions."""

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (
            nn.Linear(size, heads * head_dim, bias=False) for _ in range(3)
        )
        self.output = nn.Linear(heads * head_dim, size, bias=False)

    def reset_parameters(self, output_std: float) -> None:
        """output_std: scale of the output projection; 0 lets the attention say nothing at first."""
        for linear in (self.query, self.key, self.value):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        start_output(self.output.weight, output_std)

    def forward(self, x: Tensor, others: Tensor, seen: Tensor | None = None) -> Tensor:
        """What x (B, S, D) finds in others (B, N, D), as far as `seen` (B, N): (B, S, D)."""
        q, k, v = (
            in_heads(linear(value), self.heads)
            for linear, value in ((self.query, x), (self.key, others), (self.value, others))
        )
        found = scores_of(q, k, seen).softmax(dim=-1).to(v.dtype) @ v
        return self.output(out_of_heads(found))
