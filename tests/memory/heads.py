"""What memories at "heads" stand in: a softmax stage without positions, written out, and random text."""

from __future__ import annotations

import math

import torch

from memlm.memory import QKV
from memlm.memory.base import Attended, Dims

B, H, G, T, D = 2, 4, 2, 5, 3
# The stage's own scale of its scores, which a memory cannot know.
SCALE = 0.8
EXACT = {"rtol": 0.0, "atol": 1e-10}


def dims(groups: int = G) -> Dims:
    return Dims(H * D, H * D, 1, H, groups, D, T)


def local(x: QKV, mask: torch.Tensor | None = None, parts: bool = False) -> torch.Tensor | Attended:
    """Causal attention in which keys in front, real by `mask` (B, T'), are seen by every query."""
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (x.k, x.v))
    query, extra = SCALE * x.q, x.k.shape[2] - x.q.shape[2]
    seen = torch.ones(x.q.shape[2], x.k.shape[2], dtype=torch.bool).tril(extra)[None, None]
    if mask is not None and extra:
        front = torch.cat([mask[:, :extra], torch.ones_like(mask[:, extra:])], 1)
        seen = seen & front[:, None, None]
    scores = (query @ k.mT).masked_fill(~seen, -math.inf)
    y = scores.softmax(-1) @ v
    return Attended(y, scores.logsumexp(-1), query, scores) if parts else y


def segments(count: int, groups: int = G) -> list[QKV]:
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> torch.Tensor:
        return torch.randn(B, heads, T, D, generator=generator, dtype=torch.float64)

    return [QKV(random(H), random(groups), random(groups)) for _ in range(count)]


def masks(count: int) -> list[torch.Tensor]:
    """Holes, and a row that ends before the last segment."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.rand(B, T, generator=generator) < 0.7 for _ in range(count)]
    found[-1][1] = False
    return found


def softmax(scores: list[float]) -> list[float]:
    most = max(scores)
    weights = [math.exp(score - most) for score in scores]
    return [weight / sum(weights) for weight in weights]
