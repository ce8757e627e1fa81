"""The last law: trained from scratch, a memory recalls across segments what `none` cannot.

One value in four segments, and the shared recipe of benchmarks/learning.py (minutes per memory).

python -m pytest -m slow tests/memory/test_learns.py -s
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, Mamba2Config

from memlm import MemLMForCausalLM
from memlm.memory import (
    ARMTConfig,
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
    TitansMACConfig,
    TitansMAGConfig,
    TitansMALConfig,
    TOVAConfig,
    TransformerXLConfig,
    TTTLinearConfig,
    YaadConfig,
    available_memories,
)
from tests.cases import needs_recurrence

VALUES, NOISE, SEGMENT, SEGMENTS, STEPS, BATCH = 16, 16, 8, 4, 400, 64
ASK = VALUES + NOISE

RECIPES: dict[str, MemoryConfig] = {
    # The paper's zero start needs more steps than a check may take.
    "armt": ARMTConfig(num_memory_tokens=2, d_mem=16, value_std=0.1),
    "block-recurrent": BlockRecurrentConfig(num_states=8, initial_scale=4.0, output_std=0.1),
    # No gradient reaches its modes, and a token's own key finds only what is like the token.
    "camelot": CAMELoTConfig(num_modes=32, read="all"),
    # The value is 17 to 31 tokens back: beyond what is kept as it is, within what is compressed.
    "compressive": CompressiveConfig(memory_length=8, compressed_length=8, compression_rate=2),
    "fam": FAMConfig(num_memory_tokens=2),
    "gated-delta": GatedDeltaConfig(rule="delta", output_std=0.1),
    "gated-delta-heads": GatedDeltaHeadsConfig(decays=False, initial_mix=1.0),
    "hmt": HMTConfig(queue_size=4, num_sensory_tokens=2),
    "infini": InfiniConfig(),
    # No gradient reaches stored keys; a single layer needs more steps than a check may take.
    "knn": KNNConfig(capacity=32, layers=(0, 1)),
    "lact": LaCTConfig(output_std=0.1),
    "landmark": LandmarkConfig(num_blocks=4, block_length=8, top_k=4),
    "lm2": LM2Config(num_slots=4, output_std=0.1),
    "memformer": MemformerConfig(num_slots=4, output_std=0.1),
    "memora": MemoraConfig(output_std=0.1),
    "memory-caching": MemoryCachingConfig(num_slots=4, output_std=0.1),
    "memory-prompt": MemoryPromptConfig(num_memory_tokens=2, mlp_gain=1.0),
    "memoryllm": MemoryLLMConfig(pool_size=24, num_written=6),
    "mom": MoMConfig(rule="delta", output_std=0.1),
    "moneta": MonetaConfig(output_std=0.1),
    "omega": OmegaConfig(output_std=0.1),
    "rmt": RMTConfig(num_memory_tokens=2),
    "titans-mac": TitansMACConfig(output_std=0.1),
    "titans-mag": TitansMAGConfig(output_std=0.1),
    "titans-mal": TitansMALConfig(output_std=0.1),
    "tova": TOVAConfig(memory_length=32),
    "transformer-xl": TransformerXLConfig(memory_length=32),
    "ttt-linear": TTTLinearConfig(mini_batch=8, output_std=0.1),
    "yaad": YaadConfig(output_std=0.1),
}


def documents(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A value somewhere in the first segment, noise, and the question at the end of the last."""
    shape = (count, SEGMENT * SEGMENTS)
    ids = VALUES + torch.randint(NOISE, shape, generator=generator)
    values = torch.randint(VALUES, (count,), generator=generator)
    ids[torch.arange(count), torch.randint(SEGMENT, (count,), generator=generator)] = values
    ids[:, -1] = ASK
    return ids, values


def accuracy_after_training(memory: object, steps: int = STEPS) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    # The usual 0.02 is meant for models ten times as wide, and learns ten times slower here.
    sizes = {"vocab_size": ASK + 1, "hidden_size": 64, "initializer_range": 0.125}
    config = (
        Mamba2Config(
            num_hidden_layers=2,
            num_heads=4,
            head_dim=32,
            state_size=16,
            n_groups=1,
            chunk_size=SEGMENT,
            **sizes,
        )
        if needs_recurrence(memory)
        else LlamaConfig(
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            **sizes,
        )
    )
    model = MemLMForCausalLM.from_base(config, memory=memory, segment_length=SEGMENT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 40))
    for _ in range(steps):
        ids, target = documents(BATCH, generator)
        logits = model(ids, logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ids, target = documents(512, torch.Generator().manual_seed(2))
        answers = model(ids, logits_to_keep=1).logits[:, -1].argmax(-1)
        return float((answers == target).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("memory", available_memories())
def test_recall_across_segments(memory: str) -> None:
    accuracy = accuracy_after_training(RECIPES.get(memory, memory))
    print(f"\n{memory}: {accuracy:.3f} (chance {1 / VALUES:.3f})")
    if memory == "none":
        assert accuracy < 0.2
    else:
        assert accuracy > 0.9


def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "learning.py"
    spec = importlib.util.spec_from_file_location("benchmark_learning", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("task", ["recall", "qa1"])
@pytest.mark.parametrize("memory", available_memories())
def test_pairs_and_stories(memory: str, task: str) -> None:
    if needs_recurrence(memory):
        pytest.skip("the benchmark's base has no recurrent state")
    learning = benchmark()
    cell = learning.train_cell(learning.config_of(memory), task)
    for name, found in cell["found"].items():
        print(f"\n{memory}, {name}: {found['accuracy']:.3f} (chance {cell['chance']:.3f})")
        if memory == "none":
            assert found["accuracy"] < 1.5 * cell["chance"]
        else:
            assert found["accuracy"] > 2 * cell["chance"]
