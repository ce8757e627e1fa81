"""The last law: trained from scratch, a memory recalls across segments what `none` cannot.

    python -m pytest -m slow tests/memory/test_learns.py -s
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from memlm import MemLMForCausalLM
from memlm.memory import ARMTConfig, MemoryConfig, RMTConfig, available_memories

KEYS, VALUES, SEGMENT, PAIRS, STEPS, BATCH = 8, 8, 8, 2, 600, 64
ASK, NOISE = KEYS + VALUES, KEYS + VALUES + 1
VOCAB = NOISE + 8

RECIPES: dict[str, MemoryConfig] = {
    # The paper's zero start needs more steps than a check may take.
    "armt": ARMTConfig(num_memory_tokens=4, d_mem=16, value_std=0.1),
    "rmt": RMTConfig(num_memory_tokens=4),
}


def documents(
    count: int, pairs: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A pair in each segment but the last, which asks a key: ids (B, N) and the values (B,)."""
    ids = torch.randint(NOISE, VOCAB, (count, SEGMENT * (pairs + 1)), generator=generator)
    keys = torch.rand(count, KEYS, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (count, pairs), generator=generator)
    for i in range(pairs):
        at = SEGMENT * i + int(torch.randint(SEGMENT - 1, (1,), generator=generator))
        ids[:, at], ids[:, at + 1] = keys[:, i], KEYS + values[:, i]
    asked = torch.randint(pairs, (count, 1), generator=generator)
    ids[:, -2], ids[:, -1] = ASK, keys.gather(1, asked)[:, 0]
    return ids, KEYS + values.gather(1, asked)[:, 0]


def accuracy_after_training(memory: object, steps: int = STEPS) -> float:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        # The usual 0.02 is meant for models ten times as wide, and learns ten times slower here.
        initializer_range=0.125,
        max_position_embeddings=64,
    )
    model = MemLMForCausalLM.from_base(config, memory=memory, segment_length=SEGMENT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 40))
    for step in range(steps):
        # A curriculum: what to carry is learnt from one pair, which of several to recall afterwards.
        ids, target = documents(BATCH, 1 if step < steps // 4 else PAIRS, generator)
        logits = model(ids, logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ids, target = documents(512, PAIRS, torch.Generator().manual_seed(2))
        return float((model(ids, logits_to_keep=1).logits[:, -1].argmax(-1) == target).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("memory", available_memories())
def test_recall_across_segments(memory: str) -> None:
    accuracy = accuracy_after_training(RECIPES.get(memory, memory))
    print(f"\n{memory}: {accuracy:.3f} (chance {1 / VALUES:.3f})")
    if memory == "none":
        assert accuracy < 0.25
    else:
        assert accuracy > 0.9
