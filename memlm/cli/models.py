"""The model and tokenizer that a command names."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any


def load_model(arguments: argparse.Namespace, memory: bool = True) -> tuple[Any, Any]:
    """The model and tokenizer that were named: a folder, a model shipped with memlm, or a hub id.

    With `memory`, others than memlm's are refused.
    """
    from transformers import AutoTokenizer

    from memlm import MemLMForCausalLM
    from memlm.pretrained import resolve_pretrained

    name = arguments.model
    model = load_named(name, arguments)
    if memory and not isinstance(model, MemLMForCausalLM):
        raise ValueError(
            f"model={name!r} is a {type(model).__name__} without memory; "
            "give a model saved by memlm, or wrap it with MemLMForCausalLM.from_base and train it"
        )
    return model, AutoTokenizer.from_pretrained(resolve_pretrained(name))


def load_named(name: str, arguments: argparse.Namespace) -> Any:
    """A model by its name, in the numbers and on the device of the `arguments`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    import memlm.modeling  # noqa: F401 - registers the model with the Auto classes
    from memlm import pretrained
    from memlm.loading import load_weights

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = pretrained.resolve_pretrained(name)
    folder = Path(name)
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"model={name!r} does not exist; give a folder or a hub id")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model={name!r} has no config.json; give the folder of a saved model")
    if arguments.dtype != "auto" and not isinstance(
        getattr(torch, arguments.dtype, None), torch.dtype
    ):
        raise ValueError(f"dtype={arguments.dtype!r} is unknown; use float32, bfloat16 or auto")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        # A launcher's processes have a device each.
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch finds no CUDA here; use --device cpu")
    load = partial(load_weights, AutoModelForCausalLM.from_pretrained, dtype=arguments.dtype)
    model = pretrained.load_named("model", name, load)
    return model.to(device).eval()
