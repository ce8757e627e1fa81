"""The models that the benchmarks measure: a random Llama of given sizes, with and without memories."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from memlm import MemLMForCausalLM


@dataclass(frozen=True)
class Shape:
    """Sizes of the base model, the text and the machine's part in it."""

    hidden: int
    layers: int
    segment: int
    segments: int
    batch: int
    vocab: int
    device: str
    dtype: str
    threads: int


def base_model(shape: Shape) -> PreTrainedModel:
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden * 11 // 4,
        num_hidden_layers=shape.layers,
        num_attention_heads=max(1, shape.hidden // 64),
        # Room for memories that put keys in front of a segment.
        max_position_embeddings=4 * shape.segment,
    )
    kind = getattr(torch, shape.dtype)
    return AutoModelForCausalLM.from_config(config, dtype=kind).to(shape.device)


def with_memory(base: PreTrainedModel, name: str, shape: Shape) -> MemLMForCausalLM:
    # A base of its own: some memories change how its attention is called.
    own = copy.deepcopy(base)
    return MemLMForCausalLM.from_base(own, memory=name, segment_length=shape.segment).to(
        shape.device
    )


def tokens(shape: Shape) -> Tensor:
    size = (shape.batch, shape.segments * shape.segment)
    return torch.randint(shape.vocab, size, device=shape.device)
