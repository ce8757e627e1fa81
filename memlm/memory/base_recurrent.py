"""The base model's own recurrent state as the memory: Mamba-2 (Dao and Gu 2024), gated delta nets, hybrids.

Such a model has a long memory already; plain use of it segment by segment would throw it away at every
border. Here it is carried like any other memory's state, so that segments compute what the unsplit document
would: exactly, in a model without softmax layers. Softmax layers of a hybrid start afresh in each segment,
unless another memory stands at them ("transformer-xl" keeps their last keys and values).

No parameters and nothing to train. Gradients reach as many segments back as `bptt_depth` says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor

from memlm.memory.base import (
    Continues,
    Dims,
    InnerRecurrence,
    Memory,
    MemoryConfig,
    Site,
    accumulator_dtype,
)
from memlm.memory.parts.tokens import real_first_order, tokens_back_from, tokens_in


@dataclass(frozen=True, kw_only=True)
class BaseRecurrentConfig(MemoryConfig):
    """`layers`: those whose recurrence is carried on; None picks all that have one."""


class BaseRecurrentState(NamedTuple):
    """convolution (B, C, K - 1): inputs of the short convolution before the segment; recurrent (B, ...)."""

    convolution: Tensor
    recurrent: Tensor


class BaseRecurrent(Memory):
    """A recurrence of the base model's own that goes on where the segment before ended."""

    site: ClassVar[Site] = "recurrence"
    Config: ClassVar[type[MemoryConfig]] = BaseRecurrentConfig
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("write")

    @classmethod
    def resolve(cls, config: BaseRecurrentConfig, dims: Dims) -> BaseRecurrentConfig:
        if dims.recurrence is None:
            raise ValueError(
                "memory='base-recurrent' carries the base model's own recurrent state, and this base has "
                "none that can be carried; use a memory with a state of its own, such as 'armt'"
            )
        having = dims.recurrence.layers
        if config.layers is None:
            return replace(config, layers=having)
        without = [layer for layer in config.layers if layer not in having]
        if without:
            raise ValueError(
                f"layers={config.layers}: layers {without} of the base model have no recurrent state to "
                f"carry; use layers among {having}, or None for all of them"
            )
        return config

    def init_state(self, batch_size: int) -> BaseRecurrentState:
        sizes = self.dims.recurrence
        assert sizes is not None
        # float32: families compute the recurrence in it, whatever the model's dtype.
        wide = accumulator_dtype(self.zeros(0).dtype)
        return BaseRecurrentState(
            self.zeros(batch_size, *sizes.convolution, dtype=wide),
            self.zeros(batch_size, *sizes.recurrent, dtype=wide),
        )

    def forward(
        self,
        x: Tensor,
        state: BaseRecurrentState,
        inner: InnerRecurrence,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, BaseRecurrentState]:
        # A padded token must not stand between a token and those its convolution covers.
        order, real = real_first_order(mask)
        y, convolution, recurrent = inner(tokens_in(order, x), *state, real)
        y = tokens_back_from(order, y)
        return y, BaseRecurrentState(convolution, recurrent) if write else state
