"""The recipe of a run that names a base model and data alone: what it sets, beyond a recipe's defaults."""

from __future__ import annotations

from typing import Any

from memlm.pretrained import holds_memory


def start(base: str, memory: Any = None) -> dict[str, Any]:
    """Keys of the model section: `base` with a memory, or, where it has one already, that model again.

    memory: None is the model's own, or else "armt".
    """
    if not holds_memory(base):
        return {"base": base, "memory": memory or "armt"}
    # As a mapping it is compared with the model's own even where it is the default of a recipe.
    given = {"name": memory} if isinstance(memory, str) else memory
    return {"init_from": base} | ({} if given is None else {"memory": given})


def own_data(base: str, data: str, memory: Any = None) -> dict[str, Any]:
    """Plain values of a recipe that gives `base` a memory and trains both on the rows of `data`."""
    return {
        "model": start(base, memory),
        "data": {"source": "rows", "path": data},
        "curriculum": {"stages": [{"min_segments": 2, "max_segments": 4}]},
        "training": {
            # A pretrained base is changed little; a memory starts from nothing.
            "learning_rate": 2e-5,
            "memory_learning_rate": 1e-3,
            "warmup_steps": 10,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "bptt_depth": 4,
        },
    }
