"""Functions that treat every row alike, under `torch.vmap`: what is mapped over is joined to the rows.

For code that vmap cannot look into (functions with a backward pass written by hand, kernels without a rule
for it): called on plain tensors (G B, ...) instead, it does the work of G calls in one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def folded(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """`function(*inputs)`, also under vmap. Inputs and outputs are (B, ...), no row depends on another."""
    if not any(is_mapped(value) for value in inputs):
        return tuple(function(*inputs))
    return _Folded.apply(function, *inputs)


def is_mapped(value: Any) -> bool:
    """Whether `value` is a tensor that a vmap at work here maps over."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


class _Folded(torch.autograd.Function):
    """Only its `vmap` runs, outside the mapping, where autograd sees what `function` does."""

    @staticmethod
    def forward(function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> tuple[Tensor, ...]:
        raise AssertionError("nothing was mapped over")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, *inputs: Tensor) -> Any:
        size = info.batch_size
        joined = []
        for value, dim in zip(inputs, in_dims[1:], strict=True):
            mapped = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            joined.append(mapped.flatten(0, 1))
        # Mappings around this one, if any, meet `folded` again.
        found = folded(function, *joined)
        return tuple(value.unflatten(0, (size, -1)) for value in found), (0,) * len(found)
