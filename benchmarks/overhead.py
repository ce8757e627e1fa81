"""What a memory costs: throughput relative to the bare base model on independent segments.

Both read the same tokens in segments of the same shape; the base model knows nothing of memory. Runs are
interleaved and the ratio is taken pair by pair, in CPU seconds (GPU: device-synchronised seconds), so
that a machine whose speed drifts does not decide the result. Writes a table and JSON.

    python benchmarks/overhead.py [--hidden 256 --layers 4 --segment 512 ...]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from mechanisms import seconds
from record import ON_PLAIN_BASES, write_result
from transformers import AutoModelForCausalLM, LlamaConfig

from memlm import MemLMForCausalLM


def main(
    hidden: int = 256,
    layers: int = 4,
    segment: int = 512,
    segments: int = 4,
    batch: int = 1,
    vocab: int = 4096,
    rounds: int = 7,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/overhead.json"
    ),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=4 * segment,
    )
    kind = getattr(torch, dtype)
    base = AutoModelForCausalLM.from_config(config, dtype=kind).to(device)
    ids = torch.randint(vocab, (batch, segments * segment), device=device)

    def forward_base() -> None:
        with torch.no_grad():
            for part in ids.split(segment, dim=1):
                base(part, use_cache=False, logits_to_keep=1)

    def train_base() -> None:
        base.zero_grad(set_to_none=True)
        for part in ids.split(segment, dim=1):
            base(part, labels=part, use_cache=False).loss.backward()

    def forward(model: MemLMForCausalLM) -> None:
        with torch.no_grad():
            model(ids, logits_to_keep=None)

    def train(model: MemLMForCausalLM) -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, logits_to_keep=None).loss.backward()

    models = {
        name: MemLMForCausalLM.from_base(base, memory=name, segment_length=segment).to(device)
        for name in ON_PLAIN_BASES
    }
    rows = []
    for task, plain, memory in (
        ("forward", forward_base, forward),
        ("forward+backward", train_base, train),
    ):
        plain()
        pairs: dict[str, list[float]] = {name: [] for name in models}
        speed: dict[str, list[float]] = {name: [] for name in models}
        for model in models.values():
            memory(model)
        for _ in range(rounds):
            for name, model in models.items():
                bare = seconds(plain, device)
                ours = seconds(lambda m=model, f=memory: f(m), device)
                pairs[name].append(bare / ours)
                speed[name].append(ids.numel() / ours)
        for name, ratios in pairs.items():
            rows.append(
                {
                    "memory": name,
                    "task": task,
                    "relative_throughput": round(statistics.median(ratios), 3),
                    "lowest": round(min(ratios), 3),
                    "highest": round(max(ratios), 3),
                    "tokens_per_second": round(statistics.median(speed[name])),
                    "state_bytes": models[name].init_state(batch).nbytes,
                }
            )
    print(f"{'memory':8} {'task':18} {'relative':>9} {'lowest':>7} {'highest':>8} {'tokens/s':>9}")
    for row in rows:
        print(
            f"{row['memory']:8} {row['task']:18} {row['relative_throughput']:9.3f} {row['lowest']:7.3f} "
            f"{row['highest']:8.3f} {row['tokens_per_second']:9d}"
        )
    settings = {
        "hidden": hidden,
        "layers": layers,
        "segment": segment,
        "segments": segments,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }
    write_result(
        out,
        "throughput over the bare base model on independent segments (1 is no cost)",
        settings,
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
