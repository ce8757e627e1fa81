"""torch's attention when several layers run as one: a single call, with the layers among the rows."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from memlm.memory.parts.folding import folded


class FoldedAttention(TorchFunctionMode):
    """`scaled_dot_product_attention` without vmap, which has no rule for it on a CPU and loops there.

    Every torch function called meanwhile costs a step through Python, so this stands around attention
    alone.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        return _attention(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    inputs = [query, key, value]
    if attn_mask is not None:
        inputs.append(attn_mask.expand(len(query), *attn_mask.shape[1:]))

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor]:
        return (F.scaled_dot_product_attention(q, k, v, mask, *args, **kwargs),)

    return folded(call, *inputs)[0]
