"""Write gates that can be shut for good: what a memory holds then stays as it was, to the bit.

A sigmoid is never zero, and ten million tokens are forty thousand segments: no leak that it can
learn is small enough. The hard gate is a sigmoid stretched beyond 0 and 1 and cut there (Louizos et
al. 2018, *Learning Sparse Neural Networks through L0 Regularization*, section 2.2). A threshold
does the same to a sigmoid that was trained without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from memlm.memory.base import Memory, MemoryConfig, live_option

# How far the hard gate reaches beyond 0 and 1 before it is cut.
STRETCH = 0.1
# Prices of writing: of the mean gate of a segment, and of its largest.
COSTS = ("write_cost", "open_cost")


@dataclass(frozen=True, kw_only=True)
class GatedConfig(MemoryConfig):
    """Options of every memory with write gates; all but the first may change on a finished model.

    write_gate: "sigmoid", "hard", which reaches both 0 and 1, or "none" where a mechanism can be
    without. write_threshold: a gate below it counts as zero, outside training; float("inf") silences
    the memory. train_threshold: the same in training, forward and backward. gate_noise: scale of the
    logistic noise added to the gates' logits in training (the same paper's; 0 for none).
    gate_gradient: of a hard gate where it is cut off: "cut" for none, or "closing" for that of a gate at 1
    which would close it, so that no gate stays open out of reach of every price. A gate at 0 has none in
    either case: given what would open it, it would open at random, since nothing stands against that.
    write_cost: added to the training loss, times the mean gate over segments and layers: what is not
    worth remembering is not written. open_cost: the same, times a segment's largest gate: one open gate
    among hundreds of shut ones hardly moves the mean, yet it breaks the silence of its segment.
    """

    write_gate: str = "sigmoid"
    write_threshold: float = live_option(0.0)
    train_threshold: float = live_option(0.0)
    gate_noise: float = live_option(0.0)
    gate_gradient: str = live_option("cut")
    write_cost: float = live_option(0.0)
    open_cost: float = live_option(0.0)

    def check_gates(self, kinds: tuple[str, ...] = ("sigmoid", "hard")) -> None:
        """Refuse gates that there are not. ValueError."""
        if self.write_gate not in kinds:
            raise ValueError(
                f"write_gate={self.write_gate!r} is unknown; use {' or '.join(map(repr, kinds))}"
            )
        for name in ("write_threshold", "train_threshold"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(
                    f"{name}={value} must be at least 0; use 0 for none, or float('inf') for silence"
                )
        if not self.gate_noise >= 0:
            raise ValueError(f"gate_noise={self.gate_noise} must be 0 or more")
        for name in COSTS:
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name}={value} would pay for writing; use 0 or more")
        if self.gate_gradient not in ("cut", "closing"):
            raise ValueError(
                f"gate_gradient={self.gate_gradient!r} is unknown; use 'cut' or 'closing'"
            )
        if self.gate_gradient == "closing" and self.write_gate != "hard":
            raise ValueError(
                f"gate_gradient='closing' needs gates that are cut, but write_gate={self.write_gate!r}; "
                "use write_gate='hard', or gate_gradient='cut'"
            )
        silent = [
            name
            for name in ("write_threshold", "train_threshold", "gate_noise", *COSTS)
            if self.write_gate == "none" and getattr(self, name)
        ]
        if silent:
            raise ValueError(
                f"{silent[0]}={getattr(self, silent[0])} needs write gates, but write_gate='none'; use "
                "write_gate='hard' or 'sigmoid'"
            )


class GatedMemory(Memory):
    """A memory with write gates. Its state has two leaves about the last segment alone:

    written (B,): the mean gate, which `write_cost` is paid for, and opened (B,): the largest, which
    `open_cost` is paid for.
    """

    transient: ClassVar[frozenset[str]] = frozenset({"written", "opened"})
    config: GatedConfig

    @property
    def threshold(self) -> float:
        """What a gate must reach now, to count."""
        return self.config.train_threshold if self.training else self.config.write_threshold

    @property
    def can_be_silent(self) -> bool:
        """Whether a gate can be exactly zero."""
        return self.config.write_gate == "hard" or self.threshold > 0

    def gates_of(self, x: Any, state: Any, mask: Tensor | None) -> Tensor | None:
        """The write gates of a segment, (B, H, T); None where they are known only when most work is done.

        For whoever wants to know, before `forward`, whether it would write: all zero means that
        `forward_silent` gives the same for less.
        """
        return None

    def forward_silent(
        self, x: Any, state: Any, inner: Any, *, mask: Tensor | None
    ) -> tuple[Tensor, Any]:
        """What `forward` gives where all of `gates_of` are zero: only the state's transient leaves move."""
        raise NotImplementedError

    def silent_state(self, x: Any, state: Any, mask: Tensor | None) -> Any:
        """The state that `forward_silent` leaves, for whoever wants nothing else.

        Here: of a memory whose transient leaves are its gates alone.
        """
        none = torch.zeros_like(state.written)
        return state._replace(written=none, opened=none)

    def gates_at(self, logit: Tensor) -> Tensor:
        """The gates at `logit`, from 0 to 1, of any shape."""
        if self.training and self.config.gate_noise:
            chance = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = logit + self.config.gate_noise * torch.logit(chance)
        closing = self.config.gate_gradient == "closing"
        return open_gate(logit, self.config.write_gate, self.threshold, closing=closing)

    def largest_gate(self, state: Any) -> Tensor | None:
        return None if isinstance(state.opened, tuple) else state.opened

    def auxiliary_loss(self, before: Any, after: Any) -> Tensor | None:
        """(B,) `write_cost` times the mean gate, `open_cost` times the largest; None when both are 0."""
        config = self.config
        prices = (config.write_cost, after.written), (config.open_cost, after.opened)
        costs = [price * gate for price, gate in prices if price]
        return sum(costs[1:], costs[0]) if costs else None


def gate_statistics(gate: Tensor, real: Tensor | None, steps: int = 1) -> tuple[Tensor, Tensor]:
    """`written` and `opened` of a segment, (B,) each: the mean gate and the largest.

    gate (B, H, T steps), zero where real (B, T) is False. steps: writes per token.
    """
    count = gate.shape[2] if real is None else steps * real.sum(dim=1).clamp(min=1)
    return gate.mean(dim=1).sum(dim=1) / count, gate.amax(dim=(1, 2))


def open_gate(logit: Tensor, kind: str, threshold: float = 0.0, *, closing: bool = False) -> Tensor:
    """The gate at `logit`, from 0 to 1; what is below `threshold` is exactly 0.

    kind: "sigmoid", or "hard", which reaches both ends. closing: as in
    `GatedConfig.gate_gradient`.
    """
    gate = torch.sigmoid(logit)
    if kind == "hard":
        gate = (1 + 2 * STRETCH) * gate - STRETCH
        gate = cast(Tensor, _Cut.apply(gate)) if closing else gate.clamp(0, 1)
    return torch.where(gate < threshold, 0.0, gate) if threshold else gate


class _Cut(torch.autograd.Function):
    """What `clamp(0, 1)` gives, where what is above 1 has the gradient that leads back below it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor) -> Tensor:
        return gate.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Descent moves against the gradient: it lowers a gate where that is positive.
        (gate,) = ctx.saved_tensors
        return gradient.masked_fill((gate < 0) | ((gate > 1) & (gradient < 0)), 0)
