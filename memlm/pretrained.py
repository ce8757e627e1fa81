"""The small trained models that are shipped in the package, by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memlm.card import CONFIG, SHIPPED
from memlm.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlm.modeling import MemLMForCausalLM


def available_pretrained() -> tuple[str, ...]:
    """The names of the models shipped with memlm."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))


def load_pretrained(name: str, **kwargs: Any) -> tuple[MemLMForCausalLM, PreTrainedTokenizerBase]:
    """Load a model shipped with memlm and its tokenizer, without a network, for use (`model.eval()`).

    name: one of `available_pretrained()`, such as "qa1"; each folder has a model card. kwargs: for
    `from_pretrained`, such as dtype. ValueError on another name.
    """
    if name not in available_pretrained():
        raise ValueError(
            f"name={name!r} is no model shipped with memlm; use one of "
            f"{', '.join(available_pretrained())}, or load your own with "
            "AutoModelForCausalLM.from_pretrained"
        )
    from transformers import AutoTokenizer

    from memlm.modeling import MemLMForCausalLM

    folder = SHIPPED / name
    model = MemLMForCausalLM.from_pretrained(folder, **kwargs).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def resolve_pretrained(name: str) -> str:
    """The folder of a shipped model where `name` is one's; a model's folder and any other name as given.

    As transformers does with ids of the hub, a folder of that name in the working directory is preferred.
    """
    if name in available_pretrained() and not os.path.isfile(os.path.join(name, "config.json")):
        return str(SHIPPED / name)
    return name


def holds_memory(name: str) -> bool:
    """Whether `name` is a shipped model, or the folder of one with a memory; the hub is not asked."""
    path = Path(resolve_pretrained(name)).expanduser() / CONFIG
    # Its config says so itself; what is wrong with the file is said when the model is loaded.
    try:
        return path.is_file() and read_json(path).get("model_type") == "memlm"
    except (ValueError, AttributeError):
        return False


def load_named(key: str, name: str, load: Callable[[str], Any]) -> Any:
    """What `load` finds under a name: a folder, a model shipped with memlm, or an id of the hub.

    OSError that names the key where it is none of these.
    """
    place = resolve_pretrained(name)
    try:
        return load(place)
    except OSError as error:
        if Path(place).is_dir():
            raise
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{key}={name!r} is no folder, not found on the hub ({reason}), and none of the models "
            f"shipped with memlm; these are {', '.join(available_pretrained())}"
        ) from error
