"""What the suites run over: one config per mechanism, tiny models of real architectures."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from memlm.memory import (
    ARMTConfig,
    CompressiveConfig,
    GatedDeltaConfig,
    GatedDeltaHeadsConfig,
    InfiniConfig,
    KNNConfig,
    LaCTConfig,
    MemoryCachingConfig,
    MemoryConfig,
    RMTConfig,
    RMTRConfig,
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
    TransformerXLConfig,
)
from memlm.modeling import MemLMForCausalLM

# One line per mechanism; a test compares these names with the files and with docs/methods.md.
CASES: dict[str, MemoryConfig] = {
    "armt": ARMTConfig(num_memory_tokens=3, d_mem=8),
    "compressive": CompressiveConfig(memory_length=4, compressed_length=11, compression_rate=2),
    "gated-delta": GatedDeltaConfig(chunk_length=4, conv_size=3, num_heads=2),
    "gated-delta-heads": GatedDeltaHeadsConfig(chunk_length=4),
    "infini": InfiniConfig(),
    "knn": KNNConfig(capacity=20, top_k=5, layers=(0, 1)),
    "lact": LaCTConfig(num_heads=2, expansion=2),
    "memory-caching": MemoryCachingConfig(
        num_slots=4, top_k=2, num_heads=2, chunk_length=4, conv_size=3
    ),
    "rmt": RMTConfig(num_memory_tokens=3),
    "rmt-r": RMTRConfig(num_memory_tokens=2, bank_size=2, archive_size=3, recall=1),
    "titans-mac": TitansMACConfig(num_persistent_tokens=2, chunk_length=4, conv_size=3),
    "titans-mag": TitansMAGConfig(num_heads=2, depth=1, chunk_length=1),
    "titans-mal": TitansMALConfig(depth=3, chunk_length=6, head_dim=5, conv_size=4),
    "transformer-xl": TransformerXLConfig(memory_length=20),
}

SEGMENT = 6
VOCAB = 61
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict] = {
    "llama": _COMMON,
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "qwen3": {**_COMMON, "head_dim": 8},
    "gemma3_text": {
        **_COMMON,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "mistral": {**_COMMON, "sliding_window": None},
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "smollm3": _COMMON,
}
LAW_FAMILIES = ("llama", "gpt2", "qwen3")


def base_model(family: str, seed: int = 0, **over: object) -> PreTrainedModel:
    """A random tiny model of `family` in float64, weights large enough to matter."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**FAMILIES[family], **over})
    model = AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def randomise(module: nn.Module, std: float = 0.3, seed: int = 1) -> None:
    """Random values where a mechanism starts at zero: a memory of zeros proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(std * noise.to(parameter.dtype))


def memory_model(
    family: str, memory: object, segment_length: int = SEGMENT, **over: object
) -> MemLMForCausalLM:
    """A memory model with nothing at zero, float64, in evaluation mode."""
    config = CASES.get(memory, memory) if isinstance(memory, str) else memory
    model = MemLMForCausalLM.from_base(
        base_model(family, **over), memory=config, segment_length=segment_length
    )
    randomise(model.memory)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 2) -> torch.Tensor:
    """Random ids (B, N) without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
