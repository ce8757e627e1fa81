"""Muon for the hidden matrices, beside another optimizer (Jordan et al. 2024; Liu et al. 2025).

Muon makes a matrix's step orthogonal. Embeddings, the output head, gates and vectors are no such
matrices and stay with the optimizer that `optim` names. The rule itself is torch's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Narrower matrices, such as a gate for each head, are rows side by side: nothing is to be orthogonal there.
NARROWEST = 8


def hidden_matrices(model: nn.Module) -> list[torch.Tensor]:
    """Trained weights of the linear layers of `model`, except its output head and narrow ones."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if isinstance(head, nn.Linear):
        embedded.add(id(head.weight))
    found = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and module.weight.is_floating_point()
        and min(module.weight.shape) >= NARROWEST
    }
    return [weight for key, weight in found.items() if key not in embedded]


class WithMuon(torch.optim.Optimizer):
    """Two optimizers as one: Muon steps the groups that are its own, `other` the rest.

    matrices: taken out of the groups of `other`. learning_rate: Muon's; its steps are scaled to the size of
    AdamW's (Liu et al. 2025, section 2.2), and its weight decay is that of the group a matrix was in.
    """

    def __init__(
        self, other: torch.optim.Optimizer, matrices: list[torch.Tensor], learning_rate: float
    ) -> None:
        own = {id(matrix) for matrix in matrices}
        taken: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        for group in other.param_groups:
            mine = [p for p in group["params"] if id(p) in own]
            left = [p for p in group["params"] if id(p) not in own]
            if mine:
                taken.append({"params": mine, "weight_decay": group.get("weight_decay", 0.0)})
            if left:
                kept.append({**group, "params": left})
        if not taken:
            raise ValueError(
                f"muon_learning_rate={learning_rate} finds no hidden matrix to step: no trained parameter "
                f"is the weight of a linear layer at least {NARROWEST} wide; leave it out"
            )
        self.other = other
        self.muon = torch.optim.Muon(taken, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
        groups = [{**group, "muon": True} for group in self.muon.param_groups]
        super().__init__([*groups, *({**group, "muon": False} for group in kept)], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Let each step its groups, as they are now: schedules, and loading, may have replaced them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer, own in ((self.muon, True), (self.other, False)):
            optimizer.param_groups = [g for g in self.param_groups if g["muon"] is own]
            optimizer.state = self.state
            if optimizer.param_groups:
                optimizer.step()
        return loss


def check_muon(learning_rate: float, memory_rate: float | None, sharded: bool) -> None:
    """Refuse what cannot go together. ValueError."""
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(
            f"muon_learning_rate={learning_rate} needs torch 2.9 or newer, and this is "
            f"{torch.__version__}; leave it out, or update torch"
        )
    if memory_rate is not None:
        raise ValueError(
            f"memory_learning_rate={memory_rate} and muon_learning_rate={learning_rate} would both set the "
            "rate of the memories' matrices; give one of them"
        )
    if sharded:
        raise ValueError(
            f"muon_learning_rate={learning_rate} needs whole matrices, and FSDP shards them; use DDP, or "
            "leave it out"
        )
