"""Weights by the name of a folder or of a repository on the hub, from safetensors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_weights(load: Callable[..., Any], name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """What `load`, a `from_pretrained` of transformers, makes of a folder or hub id, without pickle.

    Where it finds no safetensors, transformers reads a pickle (pytorch_model.bin). Here that is an OSError,
    which says how to write safetensors, unless use_safetensors=False is among `kwargs`.
    """
    unasked = kwargs.get("use_safetensors") is not False
    kwargs["use_safetensors"] = unasked
    folder = Path(name, kwargs.get("subfolder") or "")
    if unasked and kwargs.get("gguf_file") is None and _only_pickled(folder):
        raise _pickle_refused(name)
    try:
        return load(name, **kwargs)
    except OSError as error:
        # What transformers says of an id of the hub whose weights are pickled.
        if unasked and "cannot be loaded with `safetensors`" in str(error):
            raise _pickle_refused(name) from error
        raise


def _only_pickled(folder: Path) -> bool:
    """Whether a folder has weights, of a model or of an adapter of peft, in a pickle alone."""
    return any(
        any(folder.glob(pickled)) and not any(folder.glob(safe))
        for pickled, safe in (
            ("pytorch_model*.bin", "model*.safetensors"),
            ("adapter_model.bin", "adapter_model.safetensors"),
        )
    )


def _pickle_refused(name: str | os.PathLike[str]) -> OSError:
    return OSError(
        f"{os.fspath(name)!r} has its weights in a pickle (.bin) alone, which is not loaded unasked; if "
        "you trust it, write safetensors: "
        "AutoModelForCausalLM.from_pretrained(name, use_safetensors=False).save_pretrained(folder)"
    )
