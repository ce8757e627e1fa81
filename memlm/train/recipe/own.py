"""The recipe of a run that names a base model and data alone: what it sets, beyond a recipe's defaults."""

from __future__ import annotations

from typing import Any


def own_data(base: str, data: str, memory: Any = "armt") -> dict[str, Any]:
    """Plain values of a recipe that gives `base` a memory and trains both on the rows of `data`."""
    return {
        "model": {"base": base, "memory": memory},
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
