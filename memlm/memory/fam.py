"""TransformerFAM: in each layer, vectors that are read in front of a segment and, at its end, pass through
the layer themselves to become what the next segment reads (Hwang et al. 2024, feedback attention memory).

The memory of a layer is made by that layer from what it was, so that it is of the layer's own kind and has
no weights. The vectors stand twice in the layer's sequence, [F; x; F]: in front, where the tokens see
them, and behind, where they see the tokens, and what comes out is the next F. The only parameters are the
embeddings of the vectors: in the first segment of a document, where a layer has none yet, they go up
through the layers behind the segment, and nothing stands in front, so that the base model is left as it
was.

Not in the paper: the limit to a vector's length (`keeps_length`). A layer adds to what passes through it,
and so the vectors would grow with the document.

Letters: F vectors of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from memlm.memory.base import (
    Continues,
    Dims,
    Inner,
    Memory,
    MemoryConfig,
    Site,
    accumulator_dtype,
    option,
)
from memlm.memory.parts.checks import check_least, memory_tokens_for


@dataclass(frozen=True, kw_only=True)
class FAMConfig(MemoryConfig):
    """Options of TransformerFAM.

    num_memory_tokens: vectors of a layer, F; None picks 16, or half a segment. keeps_length: whether a
    vector never becomes longer than after the first segment of its document (not in the paper, where every
    segment adds to it, so that later ones count ever less). token_std: scale of their embeddings at the
    start; None takes the embeddings'.
    """

    num_memory_tokens: int | None = None
    keeps_length: bool = True
    token_std: float | None = option(None)

    @classmethod
    def paper(cls) -> Self:
        """64 vectors, with segments of 1,024 tokens, that grow as they will.

        The paper also trains from states of other documents: `initial_state="pass"` and
        `initial_state_probability=0.8` of the trainer.
        """
        return cls(num_memory_tokens=64, keeps_length=False)


class FAMState(NamedTuple):
    """vectors (B, F, D); lengths (B, F), float32 or wider: those after the first segment. Zeros before."""

    vectors: Tensor
    lengths: Tensor


class FAM(Memory):
    """Feedback attention memory around a layer."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = FAMConfig
    neutral: ClassVar[bool] = True
    accumulates: ClassVar[bool] = False
    continues: ClassVar[Continues] = Continues("front")

    def __init__(self, config: FAMConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.num_memory_tokens is not None
        self.count, self.keeps_length = config.num_memory_tokens, config.keeps_length

    @classmethod
    def resolve(cls, config: FAMConfig, dims: Dims) -> FAMConfig:
        if config.num_memory_tokens is None:
            return replace(config, num_memory_tokens=memory_tokens_for(None, dims))
        check_least(config, {"num_memory_tokens": 1})
        return config

    @classmethod
    def num_segment_tokens(cls, config: Any) -> int:
        return config.num_memory_tokens

    @classmethod
    def segment_token_std(cls, config: Any, embedding_std: float) -> float:
        return embedding_std if config.token_std is None else config.token_std

    @classmethod
    def num_inserted(cls, config: Any, dims: Dims) -> int:
        return config.num_memory_tokens

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return 2 * config.num_memory_tokens

    def init_state(self, batch_size: int) -> FAMState:
        vectors = self.zeros(batch_size, self.count, self.dims.hidden_size)
        dtype = accumulator_dtype(vectors.dtype)
        return FAMState(vectors, self.zeros(batch_size, self.count, dtype=dtype))

    def forward(
        self, x: Tensor, state: FAMState, inner: Inner, *, mask: Tensor | None, write: bool = True
    ) -> tuple[Tensor, FAMState]:
        before, begun = state.vectors.to(x.dtype), state.lengths > 0
        if write:
            # `x` ends with what the layers below made of the vectors' embeddings.
            tokens, fresh = x[:, : -self.count], x[:, -self.count :]
            x = torch.cat([tokens, torch.where(begun.unsqueeze(-1), before, fresh)], dim=1)
        present = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        longer, real = torch.cat([before, x], dim=1), torch.cat([begun, present], dim=1)
        y = inner(longer, mask=real)[:, self.count :]
        return y, (self.write(y[:, -self.count :], state) if write else state)

    def write(self, new: Tensor, state: FAMState) -> FAMState:
        """The state with the vectors `new` (B, F, D), as the layer returned them."""
        length = torch.linalg.vector_norm(new, dim=-1, dtype=state.lengths.dtype)
        lengths = torch.where(state.lengths > 0, state.lengths, length)
        if self.keeps_length:
            # The first time a vector is as long as it is.
            share = (lengths / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1)
            new = new * share.unsqueeze(-1).to(new.dtype)
        return FAMState(new.to(state.vectors.dtype), lengths)
