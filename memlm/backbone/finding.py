"""The stages of a base model, found by structure, never by class name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def new_base(config: Any, attention: str | None, dtype: torch.dtype) -> PreTrainedModel:
    """A base model of `config` with random weights, and the attention implementation `attention`."""
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if attention == "sdpa" and known is not None and not known._supports_sdpa:
        # transformers takes it for what was asked where nothing was; models without softmax refuse it.
        attention = None
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)


def find_layers(base: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers of `base`, by structure. ValueError when there is no such list."""
    return _children(layer_list(base))


def layer_list(base: PreTrainedModel) -> nn.ModuleList:
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name, module)
        for name, module in base.get_decoder().named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in _children(module))
    ]
    if not lists:
        raise ValueError(
            f"base={type(base).__name__} has no list of {count} decoder layers; "
            "use a decoder-only causal language model of transformers"
        )
    return min(lists, key=lambda found: found[0].count("."))[1]


def find_attention(layer: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a decoder layer (one in all families met so far)."""
    return [child for child in _children(layer) if "Attention" in type(child).__name__]


def find_in_family(module: nn.Module, name: str) -> Callable[..., Any] | None:
    """A function from the file of a family's attention, such as the one that rotates queries and keys."""
    for cls in type(module).__mro__:
        found = getattr(sys.modules[cls.__module__], name, None)
        if found is not None:
            return found
    return None


def works_on(module: nn.Module) -> torch.device:
    """The device `module` computes on: its parameters', or the one accelerate's hooks move them to."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for single in getattr(hook, "hooks", (hook,)):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(chain(module.parameters(), module.buffers())).device


def _children(parent: nn.Module) -> list[nn.Module]:
    """The children of `parent`, each without the wrappers around it that only pass the call on."""
    return [unwrapped(child) for child in parent.children()]


def unwrapped(module: nn.Module) -> nn.Module:
    while isinstance(module, ActivationWrapper):
        (module,) = module.children()
    return module
