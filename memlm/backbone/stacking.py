"""The weights of layers that are alike, as one: where they stand one behind the other in memory, no copy.

`stacked` moves them there once, and lets the parameters point into it. Nothing is kept besides: whether
parameters stand in a stack is seen from where they are, so whatever moves them (`model.to`, a checkpoint
loaded another way, a deep copy) at worst costs another move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def stacked(parameters: Sequence[nn.Parameter]) -> Tensor:
    """(n, ...) in the memory of the parameters, which are moved if they do not stand together yet."""
    found = _in_place(parameters)
    if found is None:
        found = torch.stack([parameter.data for parameter in parameters])
        for parameter, place in zip(parameters, found, strict=True):
            parameter.data = place
    return found


def separate(parameters: Sequence[nn.Parameter]) -> None:
    """Give each parameter memory of its own again."""
    for parameter in parameters:
        if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone()


def _in_place(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    first = parameters[0]
    size = first.numel()
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for index, one in enumerate(parameters):
        together = (
            one.is_contiguous()
            and one.untyped_storage().data_ptr() == storage
            and one.storage_offset() == start + index * size
        )
        if not together:
            return None
    shape = (len(parameters), *first.shape)
    return first.data.as_strided(shape, (size, *first.stride()), start)


def with_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """As `stacked`, with a gradient that reaches each parameter."""
    found = stacked(parameters)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
        return _Stacked.apply(found, *parameters)
    return found


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stack: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        ctx.versions = [parameter._version for parameter in parameters]
        return stack.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The stack's own version counter does not see what is done to the parameters.
        if any(p._version != v for p, v in zip(ctx.parameters, ctx.versions, strict=True)):
            raise RuntimeError(
                "a parameter was changed between forward and backward; run backward before the optimizer's "
                "step"
            )
        needed = zip(gradient.unbind(), ctx.needs_input_grad[1:], strict=True)
        return None, *(one if wanted else None for one, wanted in needed)
