"""Tokens in an order of their own, and short convolutions over them, for memories written by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def real_first_order(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """An order (B, T) with each row's real tokens first, so that chunks do not depend on the padding.

    Also the mask (B, T) in that order; None and None without padding.
    """
    if mask is None:
        return None, None
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    return order, mask.gather(1, order)


def tokens_at(x: Tensor, places: Tensor) -> Tensor:
    """The tokens of `x` (B, T, D) that stand at `places` (B, n): (B, n, D)."""
    # Rows of a matrix, each copied whole: `gather` would look every number up.
    first = x.shape[1] * torch.arange(len(x), device=x.device)
    found = x.flatten(0, 1).index_select(0, (first.unsqueeze(1) + places).flatten())
    return found.unflatten(0, places.shape)


def tokens_in(order: Tensor | None, x: Tensor) -> Tensor:
    """`x` (B, T, D) with its tokens in `order` (B, T); as it is for None."""
    return x if order is None else tokens_at(x, order)


def tokens_back_from(order: Tensor | None, y: Tensor) -> Tensor:
    """`y` (B, T, D), whose tokens are in `order`, with each at the place it came from."""
    if order is None:
        return y
    return torch.zeros_like(y).scatter(1, order.unsqueeze(-1).expand_as(y), y)


def recent_inputs(
    x: Tensor, before: Tensor, real: Tensor | None, project: Callable[[Tensor], Tensor]
) -> Tensor:
    """What `short_convolution` would keep of `project(x)`, projecting those tokens alone: like `before`.

    x (B, T, D), project: to (B, ., n). before, real: as `short_convolution` takes them.
    """
    kept, length = before.shape[1], x.shape[1]
    if real is None and length >= kept:
        return project(x[:, length - kept :]).to(before.dtype)
    count = torch.full_like(x[:, :1, 0], length, dtype=torch.long)
    count = count if real is None else real.sum(dim=1, keepdim=True)
    # Places in `before` and `x` joined.
    places = count + torch.arange(kept, device=x.device)
    new = project(tokens_at(x, (places - kept).clamp(min=0)))
    old = tokens_at(before, places.clamp(max=kept - 1))
    return torch.where((places < kept).unsqueeze(-1), old, new.to(before.dtype))


def latest_tokens(x: Tensor, before: Tensor, real: Tensor | None) -> Tensor:
    """The last tokens of `before` (B, H, n, ...) and `x` (B, H, T, ...) joined, as many as `before` has.

    real (B, T): which of `x` are, real ones first; None: all.
    """
    joined = torch.cat([before, x.to(before.dtype)], dim=2)
    if real is None:
        return joined[:, :, x.shape[2] :]
    places = real.sum(dim=1, keepdim=True) + torch.arange(before.shape[2], device=x.device)
    return joined.take_along_dim(places.view(len(x), 1, -1, *[1] * (x.ndim - 3)), dim=2)


def short_convolution(
    z: Tensor, kernel: Tensor, before: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A causal convolution per channel of `z` (B, T, n), after the inputs `before` (B, size - 1, n).

    kernel (n, 1, size). real (B, T): which tokens are, real ones first; None: all. Returns (B, T, n), and
    the inputs that the next tokens come after, in the dtype of `before`.
    """
    joined = torch.cat([before.to(z.dtype), z], dim=1)
    convolve = _Convolution.apply if joined.device.type == "cpu" else _convolve
    found = convolve(joined, kernel.to(z.dtype))
    if real is None:
        rest = joined[:, z.shape[1] :]
    else:
        index = real.sum(dim=1, keepdim=True) + torch.arange(before.shape[1], device=z.device)
        rest = tokens_at(joined, index)
    return found, rest.to(before.dtype)


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """(B, size - 1 + T, n) and (n, 1, size) -> (B, T, n)."""
    return F.conv1d(x.mT, kernel, groups=x.shape[2]).mT


def _slide(x: Tensor, taps: Tensor) -> Tensor:
    """The same of taps (size, n), as a sum of shifted products."""
    length = x.shape[1] - len(taps) + 1
    found = x[:, :length] * taps[0]
    for j, tap in enumerate(taps[1:], start=1):
        found = torch.addcmul(found, x[:, j : j + length], tap)
    return found


class _Convolution(torch.autograd.Function):
    """`_convolve` as a sum of shifted products, and so is its derivative.

    On CPUs torch's own, with a group for each channel, takes up to 2.2 times as long with its derivative in
    many short rows, and leaves the tokens of a channel side by side, which makes all that follows slower
    (docs/performance.md).
    """

    # The wavefront maps over it.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: Tensor) -> Tensor:
        if x.dtype.itemsize < 4:
            # Each product of the sum would be rounded.
            return _convolve(x, kernel).contiguous()
        return _slide(x, kernel.squeeze(1).T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, kernel = ctx.saved_tensors
        size, length = kernel.shape[2], gradient.shape[1]
        padded = F.pad(gradient, (0, 0, size - 1, size - 1))
        to_x = _slide(padded, kernel.squeeze(1).T.flip(0))
        seen = (x[:, j : j + length] for j in range(size))
        to_kernel = torch.stack([(part * gradient).sum(dim=(0, 1)) for part in seen], dim=1)
        return to_x, to_kernel.unsqueeze(1)
