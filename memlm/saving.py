"""The memories' parameters alone, like an adapter: two files, written and read."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from memlm.attach import MemoryStack
from memlm.config import FORMAT_VERSION
from memlm.files import write_atomically, write_json
from memlm.memory import config_to_dict, resolve_memories

MEMORY_WEIGHTS = "memory.safetensors"
MEMORY_CONFIG = "memlm_config.json"


def save_memory(
    memory: MemoryStack, description: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    """Write the parameters of `memory` alone, with a `description` of the model they belong to."""
    from safetensors.torch import save_file

    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in memory.state_dict().items()
    }
    directory = Path(directory)
    write_atomically(directory / MEMORY_WEIGHTS, lambda path: save_file(tensors, path))
    write_json(directory / MEMORY_CONFIG, description)


def load_memory(
    memory: MemoryStack, description: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    """Read what `save_memory` wrote. ValueError when it belongs to other memories or sizes."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    directory = Path(directory)
    for name in (MEMORY_CONFIG, MEMORY_WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"directory={str(directory)!r} has no {name}; give a folder save_memory wrote"
            )
    try:
        described = json.loads((directory / MEMORY_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / MEMORY_WEIGHTS)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"directory={str(directory)!r} is damaged ({error}); save the memory again"
        ) from error
    if described.get("memlm_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"directory={str(directory)!r} has memlm format {described['memlm_version']}, this "
            f"memlm reads up to {FORMAT_VERSION}; upgrade memlm"
        )
    with contextlib.suppress(TypeError, ValueError):
        # A field that an older file does not name has the value it had then.
        entries = resolve_memories(described.get("memory"))
        described["memory"] = [config_to_dict(entry) for entry in entries]
    for key in ("memory", "hidden_size", "num_hidden_layers"):
        if described.get(key) != description[key]:
            raise ValueError(
                f"directory={str(directory)!r} was saved with {key}={described.get(key)}, but this "
                f"model has {description[key]}; build the model with the same memory"
            )
    # Before anything is copied: a memory half of which is another's would go unnoticed.
    known = {n: tuple(t.shape) for n, t in memory.state_dict().items()}
    found = {n: tuple(t.shape) for n, t in tensors.items() if t.is_floating_point()}
    if found != known:
        odd = sorted(n for n in {*known, *tensors} if known.get(n) != found.get(n))
        raise ValueError(
            f"directory={str(directory)!r} does not fit: {odd[0]!r} there is "
            f"{found.get(odd[0], 'missing or no numbers')}, here {known.get(odd[0], 'unknown')}; "
            "build the model with the same memory"
        )
    memory.load_state_dict(tensors)
