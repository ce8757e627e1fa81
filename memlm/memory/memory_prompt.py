"""MemoryPrompt: an LSTM beside the whole model, whose state is the next segment's prompt (Rakotonirina and
Baroni 2024, *MemoryPrompt*).

After each segment the last hidden state of its last token goes through an MLP into an LSTM cell. The
cell's hidden state, cut into P vectors, stands before the next segment as a prompt. Nothing stands before
the first, so that a base model is left as it was; in the paper the base stays frozen for good.

Letters: P vectors of the prompt, E embedding size, m width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

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
from memlm.memory.parts.checks import check_least


@dataclass(frozen=True, kw_only=True)
class MemoryPromptConfig(MemoryConfig):
    """Options of MemoryPrompt.

    num_memory_tokens: vectors of the prompt, P; the LSTM has P times the embedding size, and its weights
    grow with the square of that. mlp_size: width of the MLP, hidden and at its end; None for the hidden
    size. mlp_gain: scale of its weights at the start, in units of Xavier's; the paper's lets every segment
    look alike to the LSTM at first.
    """

    num_memory_tokens: int = 5
    mlp_size: int | None = None
    mlp_gain: float = option(1e-4)

    @classmethod
    def paper(cls) -> Self:
        """The published code's: five vectors, an MLP of 1,024."""
        return cls(num_memory_tokens=5, mlp_size=1024)


class MemoryPromptState(NamedTuple):
    """hidden and cell (B, P E) of the LSTM, float32 or wider; begun (B,): 1 after a segment, 0 before."""

    hidden: Tensor
    cell: Tensor
    begun: Tensor


class MemoryPrompt(Memory):
    """An LSTM that writes the prompt of the next segment."""

    site: ClassVar[Site] = "model"
    Config: ClassVar[type[MemoryConfig]] = MemoryPromptConfig
    neutral: ClassVar[bool] = True
    continues: ClassVar[Continues] = Continues("front")
    config: MemoryPromptConfig

    def __init__(self, config: MemoryPromptConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        assert config.mlp_size
        self.count, self.size = config.num_memory_tokens, dims.embedding_size
        width = self.count * self.size
        self.enter = nn.Linear(dims.hidden_size, config.mlp_size)
        self.leave = nn.Linear(config.mlp_size, config.mlp_size)
        # The LSTM's input, forget, new and output parts, from what enters and its hidden state.
        self.gates = nn.Linear(config.mlp_size + width, 4 * width)

    @classmethod
    def resolve(cls, config: MemoryPromptConfig, dims: Dims) -> MemoryPromptConfig:
        if config.layers is not None:
            raise ValueError(
                f"layers={config.layers} has no meaning for memory-prompt, which wraps the whole decoder; "
                "leave it out"
            )
        size = dims.hidden_size if config.mlp_size is None else config.mlp_size
        filled = replace(config, mlp_size=size)
        check_least(filled, {"num_memory_tokens": 1, "mlp_size": 1})
        if not filled.mlp_gain > 0:
            raise ValueError(f"mlp_gain={filled.mlp_gain} must be above 0")
        return filled

    @classmethod
    def num_extra_positions(cls, config: Any) -> int:
        return config.num_memory_tokens

    def reset_parameters(self, embedding_std: float) -> None:
        for linear in (self.enter, self.leave):
            nn.init.xavier_uniform_(linear.weight, gain=self.config.mlp_gain)
            nn.init.zeros_(linear.bias)
        # As torch starts an LSTM.
        bound = (self.count * self.size) ** -0.5
        for one in (self.gates.weight, self.gates.bias):
            nn.init.uniform_(one, -bound, bound)

    def init_state(self, batch_size: int) -> MemoryPromptState:
        dtype = accumulator_dtype(self.gates.bias.dtype)
        none = self.zeros(batch_size, self.count * self.size, dtype=dtype)
        return MemoryPromptState(none, none, self.zeros(batch_size, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        state: MemoryPromptState,
        inner: Inner,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, MemoryPromptState]:
        prompt = state.hidden.to(x.dtype).unflatten(1, (self.count, self.size))
        begun = (state.begun > 0).unsqueeze(1).expand(-1, self.count)
        present = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        longer, real = torch.cat([prompt, x], dim=1), torch.cat([begun, present], dim=1)
        y = inner(longer, mask=real)[:, self.count :]
        return y, (self.write(y, state, present) if write else state)

    def write(self, y: Tensor, state: MemoryPromptState, real: Tensor) -> MemoryPromptState:
        """The LSTM's step on the last real token of `y` (B, T, D), real (B, T) bool."""
        places = torch.arange(y.shape[1], device=y.device)
        last = torch.where(real, places, 0).amax(dim=1)[:, None, None].expand(-1, 1, y.shape[2])
        seen = self.leave(self.enter(y.gather(1, last).squeeze(1)).relu())
        z = self.gates(torch.cat([seen, state.hidden.to(seen.dtype)], dim=1)).to(state.cell.dtype)
        enter, keep, new, leave = z.chunk(4, dim=1)
        cell = torch.sigmoid(keep) * state.cell + torch.sigmoid(enter) * torch.tanh(new)
        hidden = torch.sigmoid(leave) * torch.tanh(cell)
        return MemoryPromptState(hidden, cell, torch.ones_like(state.begun))
