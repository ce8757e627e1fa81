"""The state after a million tokens in which nothing is written: equal to the bit, or how far from it.

For each memory with write gates: some text is read and written, then every gate is shut and a million
tokens of real text follow. The memory computes in full (nothing is skipped), so the mechanism itself is
asked. Transient leaves, which say something of the last segment alone, are left out.

    python benchmarks/silence_million.py [--tokens 1000000 --memory gated-delta ...]
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated
from unittest import mock

import torch
import typer
from silence import text
from transformers import LlamaConfig

from memlm import MemLMForCausalLM
from memlm.memory import available_memories, memory_class
from memlm.segment import cut

GATED = tuple(
    name
    for name in available_memories()
    if name != "none"
    and "write_threshold" in {field.name for field in fields(memory_class(name).Config)}
)


def main(
    tokens: int = 1_000_000,
    hidden: int = 32,
    segment: int = 256,
    memory: Annotated[list[str] | None, typer.Option(help="one or more; all by default")] = None,
) -> None:
    torch.set_num_threads(1)
    ids = text(1, tokens + 16 * segment, "cpu")
    told, noise = ids[:, : 16 * segment], ids[:, 16 * segment :]
    for name in memory or GATED:
        torch.manual_seed(0)
        base = LlamaConfig(
            vocab_size=256,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=2 * segment,
        )
        cls = memory_class(name)
        config = cls.Config(**cls.silent_with)
        model = MemLMForCausalLM.from_base(base, memory=config, segment_length=segment).eval()
        with torch.no_grad():
            for parameter in model.memory.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        with mock.patch("memlm.backbone.silence.may_skip", lambda memory, x: False):
            before = model.read(cut(told, None, None, segment))
            model.set_memory_options(write_threshold=float("inf"))
            after = model.read(cut(noise, None, None, segment), before)
        lasting = [leaf for leaf in before.tensors if not set(leaf.split(".")) & cls.transient]
        equal = all(torch.equal(before[leaf], after[leaf]) for leaf in lasting)
        numbers = sum(before[leaf].numel() for leaf in lasting)
        print(f"{name}: {numbers:,} numbers, equal to the bit: {equal}", flush=True)


if __name__ == "__main__":
    typer.run(main)
