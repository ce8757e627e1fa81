"""Which model and versions an evaluation ran with; and evaluation mode for as long as it runs."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from memlm.memory import config_from_dict
from memlm.memory.parts.gates import GatedConfig


@contextmanager
def without_training(model: Any) -> Iterator[None]:
    """Put the model into evaluation mode, and at the end every module back into the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def fingerprint(model: Any) -> str:
    """Name the model's class, segment length, live options that are set, and a digest of the rest.

    The digest is of the memories' configurations, which need have no parameters, and of some values of
    every parameter.
    """
    known = hashlib.blake2b(digest_size=8)
    for memory in getattr(model.config, "memory", None) or []:
        described = {key: value for key, value in memory.items() if key != "write_threshold"}
        known.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        # The ends of each tensor: reading billions of values would take longer than it is worth.
        values = parameter.detach().reshape(-1)
        ends = [*values[:8].float().tolist(), *values[-8:].float().tolist()]
        known.update(f"{name}{tuple(parameter.shape)}{ends}".encode())
    length = getattr(model.config, "segment_length", None)
    segments = "" if length is None else f"/segment_length={length}"
    if getattr(model.config, "question_segment", "open") != "open":
        segments += f"/question_segment={model.config.question_segment}"
    # Options that change a finished model's answers.
    thresholds = "".join(f"/write_threshold={value}" for value in write_thresholds(model) if value)
    return f"{type(model).__name__}{segments}{thresholds}/{known.hexdigest()}"


def write_thresholds(model: Any) -> list[float]:
    """The different thresholds of the model's memories with write gates; none where there are none."""
    configs = map(config_from_dict, getattr(model.config, "memory", None) or [])
    found = [config.write_threshold for config in configs if isinstance(config, GatedConfig)]
    return list(dict.fromkeys(found))


def schedule_of(model: Any) -> dict[str, Any]:
    """The schedule a model with memories is run under, and what "auto" goes by; {} for another model."""
    asked = getattr(model.config, "schedule", None)
    if asked is None:
        return {}
    measured = getattr(model.config, "schedule_measured", None)
    return {"schedule": asked} | ({"schedule_measured": measured} if measured else {})


def dtype_of(model: Any) -> str:
    """The type of the model's first weights that are floating-point, as `--dtype` takes it."""
    found = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return str(found).removeprefix("torch.")


def versions(model: Any) -> dict[str, str]:
    import torch
    import transformers

    import memlm

    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "memlm": memlm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} {name}",
    }
