"""What of a model its owner would miss, were it changed while it was lent."""

from __future__ import annotations

from typing import Any

import torch


def as_it_is(model: Any) -> dict[str, Any]:
    """Every module's class and own names and mode, the configuration, and what it answers."""
    found: dict[str, Any] = {
        name: (type(module), sorted(vars(module)), module.training, sorted(module._forward_hooks))
        for name, module in model.named_modules()
    }
    ids = torch.arange(40)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        found["answer"] = model(ids).logits.tolist()
    found["config"] = model.config.to_dict()
    found["attention"] = model.config._attn_implementation
    return found
