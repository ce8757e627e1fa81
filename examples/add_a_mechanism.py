"""A memory mechanism of your own: what it reads and writes; everything else is done for it.

    python examples/add_a_mechanism.py

This one carries the mean of the last segment's hidden states into the next, through a gate that starts
closed. A mechanism for the package itself is a file in memlm/memory, with its laws tested: see
CONTRIBUTING.md.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from memlm import MemLMForCausalLM
from memlm.memory import Memory, MemoryConfig, Site, register_memory


@dataclass(frozen=True, kw_only=True)
class LastMeanConfig(MemoryConfig):
    """initial_gate: the weight of what is remembered, at the start."""

    initial_gate: float = 0.0


class LastMeanState(NamedTuple):
    mean: Tensor  # (B, D)


class LastMean(Memory):
    """Adds the last segment's mean hidden state to every token of a layer's input."""

    site: ClassVar[Site] = "layer"
    Config: ClassVar[type[MemoryConfig]] = LastMeanConfig

    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.gate = nn.Parameter(torch.empty(dims.hidden_size))

    def reset_parameters(self, embedding_std: float) -> None:
        nn.init.constant_(self.gate, self.config.initial_gate)

    def init_state(self, batch_size: int) -> LastMeanState:
        return LastMeanState(self.zeros(batch_size, self.dims.hidden_size))

    def forward(
        self,
        x: Tensor,
        state: LastMeanState,
        inner: Any,
        *,
        mask: Tensor | None,
        write: bool = True,
    ) -> tuple[Tensor, LastMeanState]:
        y = inner(x + (self.gate * state.mean).unsqueeze(1).to(x.dtype))
        return (y, self.write(y, mask)) if write else (y, state)

    def write(self, y: Tensor, mask: Tensor | None) -> LastMeanState:
        # None where all tokens are real; a padded one is not to be remembered.
        mask = torch.ones(y.shape[:2], device=y.device) if mask is None else mask
        real = mask.unsqueeze(-1).to(self.gate.dtype)
        total = (y.to(self.gate.dtype) * real).sum(dim=1)
        return LastMeanState(total / real.sum(dim=1).clamp(min=1))


def main() -> None:
    register_memory("last-mean", LastMean)
    torch.manual_seed(0)
    base = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = MemLMForCausalLM.from_base(
        base, memory={"name": "last-mean", "initial_gate": 1.0}, segment_length=8
    )
    ids = torch.randint(0, 64, (1, 32))
    out = model(ids, labels=ids)
    out.loss.backward()
    gate = next(model.memory.parameters())
    print(f"loss {out.loss.item():.3f}, {out.memory_state.nbytes} bytes of memory")
    print(f"the gate learns: gradient {gate.grad.abs().sum():.4f}")
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % 64
    difference = (model(ids).logits - model(other).logits)[0, -8:].abs().max()
    print(f"the first token is remembered in the last segment: logits differ by {difference:.4f}")


if __name__ == "__main__":
    main()
