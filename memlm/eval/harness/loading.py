"""A saved model by its name, with a dtype and a device as the harness's command line names them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from memlm.loading import load_weights

_log = logging.getLogger(__name__)


def dtype_named(name: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype):
        raise ValueError(f"dtype={name!r} is unknown; use float32, bfloat16 or auto")
    return found


def device_named(name: str | torch.device) -> torch.device:
    """The device of this name; the CPU where there is no CUDA, as the command line always asks for it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is unknown; use cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        _log.warning("device=%s, but there is no CUDA here; evaluating on the CPU", name)
        return torch.device("cpu")
    return device


def load_model(name: str, dtype: str | torch.dtype, revision: str) -> Any:
    """Load a saved model. ValueError when there is none."""
    from transformers import AutoModelForCausalLM

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"pretrained={name!r} has no config.json; give the folder of a saved model"
        )
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"pretrained={name!r} does not exist; give a folder or a hub id")
    kind = dtype if dtype == "auto" else dtype_named(dtype)
    load = AutoModelForCausalLM.from_pretrained
    return load_weights(load, name, dtype=kind, revision=revision)
