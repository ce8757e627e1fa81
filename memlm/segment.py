"""Segments: a batch of rows cut into pieces of `segment_length` tokens.

Labels are shifted once, over the whole row, before anything is cut: otherwise the last token of every
segment would lose its target. Rows are packed to the left first, so that padding, wherever it stood,
never moves a segment boundary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Segment:
    """One segment of every row of a batch.

    ids (B, T) long. mask (B, T) bool, True on real tokens, real tokens first; None when every token is
    real, which spares the attention a mask. labels (B, T) long, already shifted, -100 where there is
    no target; None when no loss is wanted.
    """

    ids: Tensor
    mask: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("mask", "labels"):
            value = getattr(self, name)
            if value is not None and value.shape != self.ids.shape:
                raise ValueError(
                    f"Segment {name} has shape {tuple(value.shape)}, but ids have shape "
                    f"{tuple(self.ids.shape)}; give both the same shape"
                )

    @property
    def active(self) -> Tensor | None:
        """(B,) bool: rows with at least one real token here; None when that is all of them."""
        return None if self.mask is None else self.mask.any(dim=1)

    @property
    def rows(self) -> Tensor | int:
        """How many rows have a real token here; a tensor where the device has to count them."""
        return self.ids.shape[0] if self.mask is None else self.mask.any(dim=1).sum()


def shift_labels(labels: Tensor) -> Tensor:
    """Label of token t becomes the token at t + 1; the last has none. (B, N) -> (B, N)."""
    return torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORE)], dim=1)


@dataclass(frozen=True)
class Packing:
    """How the rows of a padded batch were moved to the left, and how to move results back.

    order (B, N): column of the original batch each packed column came from. length: the number of
    packed columns that hold a real token in some row.
    """

    order: Tensor
    mask: Tensor
    length: int

    @classmethod
    def of(cls, attention_mask: Tensor) -> Packing:
        """Find the packing of `attention_mask` (B, N), any pattern of zeros."""
        real = attention_mask.to(torch.bool)
        order = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
        packed = real.gather(1, order)
        return cls(order, packed, int(real.sum(dim=1).max()))

    def pack(self, values: Tensor) -> Tensor:
        """(B, N) -> (B, length), real tokens first."""
        return values.gather(1, self.order)[:, : self.length]

    def unpack(self, values: Tensor) -> Tensor:
        """(B, length, ...) -> (B, N, ...): back where the tokens stood, zeros on padding."""
        batch, total = self.order.shape
        tail = values.shape[2:]
        full = values.new_zeros((batch, total, *tail))
        index = self.order[:, : self.length].reshape(batch, self.length, *(1 for _ in tail))
        real = self.mask[:, : self.length].reshape(batch, self.length, *(1 for _ in tail))
        return full.scatter(1, index.expand_as(values), values * real.to(values.dtype))


def cut(
    ids: Tensor, mask: Tensor | None, labels: Tensor | None, segment_length: int
) -> Iterator[Segment]:
    """Cut packed rows (B, N) into segments of at most `segment_length` tokens, lazily.

    The last segment may be shorter. `labels` must be shifted already (`shift_labels`).
    """
    for start in range(0, ids.shape[1], segment_length):
        at = slice(start, start + segment_length)
        yield Segment(
            ids[:, at],
            None if mask is None else mask[:, at],
            None if labels is None else labels[:, at],
        )
