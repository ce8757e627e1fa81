"""Buffers of fixed size that keep the last entries pushed into them, row by row.

A buffer (B, G, N, d) is right-aligned: of its N places the last `length` (B,) hold entries, oldest first.
The others are zero, so that a row's buffer does not depend on how its batch was padded. One of blocks is
left-aligned: the first `length` places hold entries, and whole blocks leave together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memlm.memory.base import Dims


def length_kept(asked: int | None, dims: Dims) -> int:
    """Tokens that a cache keeps: those asked for, or a segment's where the places suffice. ValueError."""
    if asked is None:
        spare = dims.spare_positions
        return max(1, dims.segment_length if spare is None else min(dims.segment_length, spare))
    if asked < 1:
        raise ValueError(
            f"memory_length={asked} is no memory; give at least 1 token, or memory='none'"
        )
    return asked


def held(length: Tensor, size: int) -> Tensor:
    """(B, size) bool: which places of a right-aligned buffer hold something."""
    return torch.arange(size, device=length.device) >= size - length.unsqueeze(1)


def cleared(buffer: Tensor, length: Tensor) -> Tensor:
    """`buffer` (B, G, N, d) with zeros where nothing is held."""
    return buffer.masked_fill(~held(length, buffer.shape[2])[:, None, :, None], 0)


def pick(buffer: Tensor, index: Tensor) -> Tensor:
    """Entries `index` (B, n) of each row of `buffer` (B, G, N, d): (B, G, n, d)."""
    shape = (-1, buffer.shape[1], -1, buffer.shape[3])
    return buffer.gather(2, index[:, None, :, None].expand(shape))


def appended(
    buffers: Sequence[Tensor], length: Tensor, new: Sequence[Tensor], mask: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """`new` (B, G, T, d), its real entries by `mask` (B, T), after what the buffers hold.

    Returns right-aligned buffers (B, G, N + T, d), and how many entries they hold (B,).
    """
    size, count = buffers[0].shape[2], new[0].shape[2]
    joined = [
        torch.cat([old, fresh.to(old.dtype)], dim=2)
        for old, fresh in zip(buffers, new, strict=True)
    ]
    if mask is None:
        return joined, length + count
    real = torch.cat([held(length, size), mask], dim=1)
    order = real.to(torch.uint8).argsort(dim=1, stable=True)
    total = length + mask.sum(dim=1)
    return [cleared(pick(buffer, order), total) for buffer in joined], total


def push(
    buffers: Sequence[Tensor], length: Tensor, new: Sequence[Tensor], mask: Tensor | None
) -> tuple[list[Tensor], Tensor]:
    """As `appended`, with only the last N kept: buffers (B, G, N, d), and their length (B,)."""
    size = buffers[0].shape[2]
    joined, total = appended(buffers, length, new, mask)
    return [buffer[:, :, buffer.shape[2] - size :] for buffer in joined], total.clamp(max=size)


def push_blocks(
    buffers: Sequence[Tensor],
    length: Tensor,
    new: Sequence[Tensor],
    mask: Tensor | None,
    block: int,
) -> tuple[list[Tensor], Tensor]:
    """As `push` into left-aligned buffers whose places are blocks of `block` entries.

    Where room is needed, the oldest block leaves as a whole, so that what is held begins with a block and
    only its last one may be open. N is a multiple of `block`.
    """
    size, count = buffers[0].shape[2], new[0].shape[2]
    real = length.new_ones(len(length), count, dtype=torch.bool) if mask is None else mask
    places = torch.arange(size, device=length.device)
    real = torch.cat([places < length.unsqueeze(1), real], dim=1)
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    total = real.sum(dim=1)
    # Blocks that do not fit, rounded up.
    left = block * ((total - size).clamp(min=0) + block - 1).div(block, rounding_mode="floor")
    total = total - left
    index = order.gather(1, (places + left.unsqueeze(1)).clamp(max=size + count - 1))
    gone = (places >= total.unsqueeze(1))[:, None, :, None]
    joined = (
        torch.cat([old, fresh.to(old.dtype)], dim=2)
        for old, fresh in zip(buffers, new, strict=True)
    )
    return [pick(buffer, index).masked_fill(gone, 0) for buffer in joined], total


def block_means(
    buffer: Tensor, length: Tensor, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Means (B, G, n, d) over the entries of each block of a left-aligned buffer, in `dtype`.

    Also how many entries each block has, (B, n).
    """
    starts = torch.arange(0, buffer.shape[2], block, device=length.device)
    count = (length.unsqueeze(1) - starts).clamp(0, block)
    summed = buffer.unflatten(2, (-1, block)).sum(dim=3, dtype=dtype)
    return summed / count.clamp(min=1)[:, None, :, None], count
