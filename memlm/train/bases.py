"""The base model as a recipe wants it: its numbers, quantised, with LoRA, with a memory to start from."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from memlm.loading import load_weights
from memlm.modeling import MemLMForCausalLM
from memlm.saving import MEMORY_WEIGHTS
from memlm.train.recipe import ModelSection
from memlm.train.recipe.binding import did_you_mean

# The settings of QLoRA (Dettmers et al. 2023), and those of LLM.int8() (Dettmers et al. 2022).
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "8bit": {"load_in_8bit": True},
}


def check_base(section: ModelSection) -> None:
    """Refuse what cannot work before it is loaded: LoRA's fields, a quantised base on this machine."""
    if section.lora is not None:
        lora_config(section.lora)
    if section.quantization is not None:
        check_machine(section)


def loading(section: ModelSection) -> dict[str, Any]:
    """What transformers is told when it loads or makes the base."""
    found: dict[str, Any] = {"dtype": dtype_of(section)}
    if section.attn_implementation is not None:
        found["attn_implementation"] = section.attn_implementation
    if section.quantization is not None:
        found["quantization_config"] = quantization_config(section)
    return found


def dtype_of(section: ModelSection) -> Any:
    """The base's dtype; "auto" is left to transformers, and is float32 for a base from scratch."""
    if section.dtype == "auto":
        return "auto" if section.config is None else torch.float32
    return getattr(torch, section.dtype)


def quantization_config(section: ModelSection) -> Any:
    """transformers' configuration of a quantised base. ValueError on fields it does not have."""
    from transformers.quantizers import AutoQuantizationConfig

    given = section.quantization
    values = dict(QUANTIZATIONS[given]) if isinstance(given, str) else dict(given or {})
    if given == "4bit":
        # What is computed in: the base's own numbers, or bfloat16, in which QLoRA was published.
        narrow = section.dtype in ("bfloat16", "float16")
        values["bnb_4bit_compute_dtype"] = section.dtype if narrow else "bfloat16"
    try:
        made = AutoQuantizationConfig.from_dict(values)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"model.quantization={given!r} is none of transformers' configurations ({error}); use '4bit', "
            "'8bit', or fields of one with its quant_method"
        ) from error
    unknown = [name for name in values if name not in {"quant_method", *made.to_dict()}]
    if unknown:
        known = list(made.to_dict())
        raise ValueError(
            f"model.quantization.{unknown[0]} is not a field of {type(made).__name__}; "
            f"{did_you_mean(unknown[0], known)}"
        )
    return made


def check_machine(section: ModelSection) -> None:
    """ValueError when this machine cannot run the quantised base."""
    from transformers.quantizers import AutoHfQuantizer

    config = quantization_config(section)
    try:
        AutoHfQuantizer.from_config(config, pre_quantized=False).validate_environment(
            device_map=None
        )
    except (ImportError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.quantization={section.quantization!r} does not work on this machine ({reason}); "
            "install what it needs, or leave it out"
        ) from error


def lora_config(values: dict[str, Any]) -> Any:
    """peft's LoraConfig; without target_modules, all linear layers. ValueError on unknown fields."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("model.lora needs peft; install memlm[peft], or leave it out") from error
    known = [field.name for field in fields(LoraConfig)]
    for key in values:
        if key not in known:
            raise ValueError(
                f"model.lora.{key} is not a field of LoraConfig; {did_you_mean(key, known)}"
            )
    given = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", **values}
    try:
        return LoraConfig(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"model.lora={values!r}: {error}") from error


def add_lora(model: MemLMForCausalLM, values: dict[str, Any]) -> Any:
    """Put LoRA into the base of `model`, and return peft's wrapper of the base, which saves and merges it.

    The base is otherwise frozen; the memories train in full. ValueError when a target matches nothing.
    """
    from peft import get_peft_model

    config = lora_config(values)
    names = [name for name, _ in model.base.named_modules()]
    targets = config.target_modules
    for target in targets if isinstance(targets, (set, list)) else ():
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = (nn.Linear, Conv1D)
            ends = {
                name.rpartition(".")[2]
                for name, module in model.base.named_modules()
                if isinstance(module, linear)
            }
            raise ValueError(
                f"model.lora.target_modules names {target!r}, which matches nothing in the base; its "
                f"linear layers are {', '.join(sorted(ends))}"
            )
    try:
        return get_peft_model(model.base, config)
    except ValueError as error:
        raise ValueError(f"model.lora={values!r} does not fit the base: {error}") from error


def start_memory(model: MemLMForCausalLM, folder: str) -> None:
    """Start from the memory of another checkpoint: a saved memory model, or what `save_memory` wrote."""
    path = Path(folder).expanduser()
    try:
        if (path / MEMORY_WEIGHTS).is_file():
            model.load_memory(path)
            return
        load = AutoModelForCausalLM.from_pretrained
        other = load_weights(load, path if path.exists() else folder)
        if not isinstance(other, MemLMForCausalLM):
            raise ValueError(f"it is a {type(other).__name__} without memory")
        with tempfile.TemporaryDirectory() as kept:
            other.save_memory(kept)
            model.load_memory(kept)
    except (ValueError, OSError) as error:
        raise ValueError(f"model.init_memory={folder!r} cannot be started from: {error}") from error
