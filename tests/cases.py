"""What the suites run over: one config per mechanism, tiny models of real architectures."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from memlm.memory import (
    ARMTConfig,
    BaseRecurrentConfig,
    BlockRecurrentConfig,
    CAMELoTConfig,
    CompressiveConfig,
    FAMConfig,
    GatedDeltaConfig,
    GatedDeltaHeadsConfig,
    HMTConfig,
    InfiniConfig,
    KNNConfig,
    LaCTConfig,
    LandmarkConfig,
    LM2Config,
    MemformerConfig,
    MemoraConfig,
    MemoryCachingConfig,
    MemoryConfig,
    MemoryLLMConfig,
    MemoryPromptConfig,
    MoMConfig,
    MonetaConfig,
    OmegaConfig,
    RMTConfig,
    RMTRConfig,
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
    TOVAConfig,
    TransformerXLConfig,
    TTTLinearConfig,
    YaadConfig,
    memory_class,
    name_of,
    resolve_memories,
)
from memlm.modeling import MemLMForCausalLM

# One line per mechanism; a test compares these names with the files and with docs/methods.md.
CASES: dict[str, MemoryConfig] = {
    "armt": ARMTConfig(num_memory_tokens=3, d_mem=8),
    "base-recurrent": BaseRecurrentConfig(),
    "block-recurrent": BlockRecurrentConfig(num_states=3, num_heads=2),
    "camelot": CAMELoTConfig(num_modes=9, merge_similarity=0.5),
    "compressive": CompressiveConfig(memory_length=4, compressed_length=11, compression_rate=2),
    "fam": FAMConfig(num_memory_tokens=2),
    "gated-delta": GatedDeltaConfig(chunk_length=4, conv_size=3, num_heads=2),
    "gated-delta-heads": GatedDeltaHeadsConfig(chunk_length=4),
    "hmt": HMTConfig(queue_size=3, num_sensory_tokens=2),
    "infini": InfiniConfig(),
    "knn": KNNConfig(capacity=20, top_k=5, layers=(0, 1)),
    "lact": LaCTConfig(num_heads=2, expansion=2),
    "landmark": LandmarkConfig(num_blocks=5, block_length=4, top_k=2),
    "lm2": LM2Config(num_slots=3, num_heads=2),
    "memformer": MemformerConfig(num_slots=3),
    "memora": MemoraConfig(num_heads=2, chunk_length=4),
    "memory-caching": MemoryCachingConfig(
        num_slots=4, top_k=2, num_heads=2, chunk_length=4, conv_size=3
    ),
    "memory-prompt": MemoryPromptConfig(num_memory_tokens=2, mlp_size=8),
    "memoryllm": MemoryLLMConfig(pool_size=8, num_written=2),
    "mom": MoMConfig(num_memories=3, chunk_length=4, conv_size=3, num_heads=2, head_dim=4),
    "moneta": MonetaConfig(num_heads=2, chunk_length=4),
    "omega": OmegaConfig(num_heads=2, head_dim=5, chunk_length=4, conv_size=3, window=3),
    "rmt": RMTConfig(num_memory_tokens=3),
    "rmt-r": RMTRConfig(num_memory_tokens=2, bank_size=2, archive_size=3, recall=1),
    "titans-mac": TitansMACConfig(num_persistent_tokens=2, chunk_length=4, conv_size=3),
    "titans-mag": TitansMAGConfig(num_heads=2, depth=1, chunk_length=1),
    "titans-mal": TitansMALConfig(depth=3, chunk_length=6, head_dim=5, conv_size=4),
    "tova": TOVAConfig(memory_length=7),
    "transformer-xl": TransformerXLConfig(memory_length=20),
    "ttt-linear": TTTLinearConfig(num_heads=2, mini_batch=4, conv_size=3),
    "yaad": YaadConfig(num_heads=2, chunk_length=4, conv_size=3, initial_bound=0.3),
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
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 4,
}
_DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "head_dim": 8,
}
# How a hybrid's layers begin; those of RECURRENT all have a recurrence of their own.
_MIXED = ["linear_attention", "full_attention"]
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
# Families that the oldest transformers we work with does not have.
_IF_KNOWN = {
    family: config
    for family, config in {
        "bailing_hybrid": {
            **_COMMON,
            "num_key_value_heads": 4,
            "linear_head_dim": 8,
            "layer_types": ["linear_attention"] * 2,
        },
    }.items()
    if family in CONFIG_MAPPING
}
# Bases with a recurrent state of their own, their other layers with softmax attention.
RECURRENT: dict[str, dict] = {
    "mamba2": {
        **{k: v for k, v in _COMMON.items() if "token_id" in k or ("size" in k and k[0] != "i")},
        "num_hidden_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "residual_in_fp32": False,
    },
    "falcon_h1": {**_COMMON, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 8},
    "qwen3_next": {
        **_COMMON,
        **_DELTA,
        "layer_types": _MIXED,
        "num_experts": 0,
        "mlp_only_layers": [0, 1],
    },
    "bamba": {**_COMMON, **_MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **_COMMON,
        **_MAMBA,
        "layer_types": _MIXED,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
    },
    "kimi_linear": {
        **_COMMON,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "layer_types": _MIXED,
        "mlp_layer_types": ["dense", "dense"],
    },
    "nemotron_h": {
        **_COMMON,
        "layer_types": _MIXED,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "head_dim": 8,
    },
    **_IF_KNOWN,
    "olmo_hybrid": {**_COMMON, **_DELTA, "layer_types": _MIXED},
    "qwen3_5_text": {**_COMMON, **_DELTA, "layer_types": _MIXED},
    "zamba2": {
        **_COMMON,
        "num_hidden_layers": 3,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 2,
        "chunk_size": 4,
        "num_mem_blocks": 1,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
        "hybrid_layer_ids": [1],
    },
}
LAW_FAMILIES = ("llama", "gpt2", "qwen3")
RECURRENT_FAMILIES = ("mamba2", "falcon_h1", "qwen3_next")


# One of each site, for what depends on where a memory stands and not on what it computes there.
A_SITE_EACH = ("rmt", "armt", "titans-mac", "infini", "base-recurrent")


def by_default(values: Iterable[str], chosen: Container[str]) -> list[Any]:
    """All values as parameters of a test; those that are not chosen are marked slow."""
    return [
        pytest.param(value, marks=() if value in chosen else pytest.mark.slow) for value in values
    ]


def deeper(family: str) -> dict[str, object]:
    """What gives a tiny model of `family` layers that are alike: four, or three where they all are."""
    known = (FAMILIES | RECURRENT)[family]
    kinds = known.get("layer_types")
    if kinds is None:
        return {"n_layer" if "n_layer" in known else "num_hidden_layers": 3}
    more: dict[str, object] = {"num_hidden_layers": 4, "layer_types": [*kinds, *kinds]}
    return more | ({"mlp_only_layers": [0, 1, 2, 3]} if "mlp_only_layers" in known else {})


def needs_recurrence(memory: object) -> bool:
    """Whether a memory stands at a recurrence of the base model's own."""
    known = CASES.get(memory, memory) if isinstance(memory, str) else memory
    return any(
        memory_class(name_of(config)).site == "recurrence" for config in resolve_memories(known)
    )


def families_of(memory: object) -> tuple[str, ...]:
    """The architectures on which a memory is held to the laws."""
    return RECURRENT_FAMILIES if needs_recurrence(memory) else LAW_FAMILIES


def standing(memory: object, family: str) -> str:
    """`family`, or the one in its place where the memory cannot stand on it."""
    if not needs_recurrence(memory) or family in RECURRENT:
        return family
    at = LAW_FAMILIES.index(family) if family in LAW_FAMILIES else 0
    return RECURRENT_FAMILIES[at]


@contextmanager
def float64_stays() -> Iterator[None]:
    """What families compute in float32 whatever the model's dtype, in float64 where that comes in.

    Else nothing of a recurrence could be compared more closely than float32 has it.
    """
    narrow, convert = torch.Tensor.float, torch.Tensor.to

    def to_float(self, *args, **kwargs):
        return self if self.dtype == torch.float64 else narrow(self, *args, **kwargs)

    def to(self, *args, **kwargs):
        # `Module.to` and `MemoryState.to` name a device as well, and mean the dtype.
        if self.dtype == torch.float64 and "device" not in kwargs:
            if args and args[0] is torch.float32:
                args = (torch.float64, *args[1:])
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return convert(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", to_float)
        patch.setattr(torch.Tensor, "to", to)
        yield


def base_model(family: str, seed: int = 0, **over: object) -> PreTrainedModel:
    """A random tiny model of `family` in float64, weights large enough to matter."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**{**(FAMILIES | RECURRENT)[family], **over})
    model = AutoModelForCausalLM.from_config(config).to(torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                # A state that is forgotten within a segment proves nothing.
                parameter.sub_(4)
            elif parameter.ndim > 1:
                parameter.mul_(5)
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if family in RECURRENT and rotary is not None:
        # Angles are computed in float32, with positions in it, where `float64_stays` as well.
        rotary.to(torch.float32)
    return model


def randomise(module: nn.Module, std: float = 0.3, seed: int = 1) -> None:
    """Random values where a mechanism starts at zero: a memory of zeros proves nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(std * noise.to(parameter.dtype))


# Models that were made once, and what the generator of random numbers stood at then.
_MADE: dict[object, tuple[MemLMForCausalLM, torch.Tensor]] = {}


def memory_model(
    family: str, memory: object, segment_length: int = SEGMENT, **over: object
) -> MemLMForCausalLM:
    """A memory model with nothing at zero, float64, in evaluation mode.

    A copy where the same was asked for before: that costs half of what making it does, and the suite
    asks some thousand times.
    """
    config = CASES.get(memory, memory) if isinstance(memory, str) else memory
    kinds = tuple((type(one), repr(one)) for one in resolve_memories(config))
    key = family, kinds, segment_length, repr(sorted(over.items()))
    if key not in _MADE:
        # What is measured would not be the same twice; law 10 ties the wavefront to the sequence.
        model = MemLMForCausalLM.from_base(
            base_model(standing(memory, family), **over),
            memory=config,
            segment_length=segment_length,
            schedule="sequential",
        )
        randomise(model.memory)
        _MADE[key] = model.eval(), torch.get_rng_state()
    model, drawn = _MADE[key]
    torch.set_rng_state(drawn)
    return _copied(model)


def _copied(model: MemLMForCausalLM) -> MemLMForCausalLM:
    """`copy.deepcopy` in two thirds of its time: a module has a dozen dicts, nearly all of them empty."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()
    return copy.deepcopy(model, memo)


def tokens(batch: int, length: int, seed: int = 2) -> torch.Tensor:
    """Random ids (B, N) without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
