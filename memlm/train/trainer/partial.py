"""Checkpoints of what is trained alone, where the base has LoRA in it or is quantised.

The other weights are read from the base again. A base that is trained or merely frozen is saved whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import Trainer
from transformers.utils import SAFE_WEIGHTS_NAME

from memlm.card import CARD
from memlm.files import write_atomically
from memlm.folders import replace_together
from memlm.modeling import MemLMForCausalLM
from memlm.saving import renew_card, weights_pattern


class TrainedAlone(Trainer):
    """Saves and loads the weights of a checkpoint."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or self.args.output_dir)
        if not saves_trained_alone(model):
            if not self.args.should_save:
                super()._save(output_dir, state_dict)
                return
            with replace_together(folder, weights_pattern()) as staged:
                super()._save(str(staged), state_dict)
                # It names the folder, and keeps what somebody wrote into the one there.
                (staged / CARD).unlink(missing_ok=True)
            renew_card(folder)
        elif self.args.should_save:
            save_trained(model, folder, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if saves_trained_alone(model):
            check_trained(model, load_result.missing_keys)
        else:
            super()._issue_warnings_after_load(load_result)


def saves_trained_alone(model: MemLMForCausalLM) -> bool:
    """Whether checkpoints hold what is trained alone: with LoRA in the base, or a quantised base."""
    quantised = any(not p.is_floating_point() for p in model.base.parameters())
    return quantised or hasattr(model.base, "peft_config")


def save_trained(model: nn.Module, folder: Path, whole: Any = None) -> None:
    """Write the parameters that are trained, where the Trainer looks for a checkpoint's weights.

    whole: the state dict, gathered from the processes that have it in parts.
    """
    tensors = {
        name: (whole[name] if whole else parameter).detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    write_atomically(folder / SAFE_WEIGHTS_NAME, lambda path: save_file(tensors, path))


def check_trained(model: nn.Module, missing: Iterable[str]) -> None:
    """ValueError when a checkpoint lacked a parameter that is trained."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if lost := sorted(trained.intersection(missing)):
        raise ValueError(
            f"the checkpoint has no {lost[0]}; resume with the same model.lora and memory, or start over"
        )
