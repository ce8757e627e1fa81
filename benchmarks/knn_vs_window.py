"""kNN memory against Transformer-XL with as long a memory: the time of one segment over a full memory.

Both stand on the last layer of the same base. Runs are interleaved and the ratio is taken pair by pair, in
CPU seconds (GPU: device-synchronised seconds). Writes a table and JSON.

    python benchmarks/knn_vs_window.py [--lengths 512,2048,8192 --segment 512 ...]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from record import write_result
from timing import seconds
from transformers import AutoModelForCausalLM, LlamaConfig

from memlm import MemLMForCausalLM, MemoryState
from memlm.memory import KNNConfig, MemoryConfig, TransformerXLConfig


def full(model: MemLMForCausalLM, batch: int, length: int) -> MemoryState:
    """A state whose places are all taken, by random keys and values."""
    state = model.init_state(batch)
    for name, tensor in state.tensors.items():
        if name.endswith("length"):
            tensor.fill_(length)
        else:
            tensor.normal_()
    return state


def main(
    lengths: str = "512,2048,8192",
    hidden: int = 256,
    layers: int = 2,
    segment: int = 512,
    batch: int = 1,
    rounds: int = 7,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/knn_vs_window.json"
    ),
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = [int(length) for length in lengths.split(",")]
    heads = max(2, hidden // 64)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=max(sizes) + segment,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device)
    ids = torch.randint(256, (batch, segment), device=device)
    at = (layers - 1,)
    rows = []
    print(
        f"{'length':>7} {'memory':10} {'task':17} {'time ratio':>10} {'lowest':>7} {'highest':>8}"
    )
    for length in sizes:
        memories: dict[str, MemoryConfig] = {
            "window": TransformerXLConfig(memory_length=length, layers=at),
            "knn gate": KNNConfig(capacity=length, layers=at),
            "knn joint": KNNConfig(capacity=length, layers=at, combine="joint"),
        }
        models = {
            name: MemLMForCausalLM.from_base(base, memory=memory, segment_length=segment).to(device)
            for name, memory in memories.items()
        }
        states = {name: full(model, batch, length) for name, model in models.items()}

        def run(
            name: str,
            train: bool,
            models: dict[str, MemLMForCausalLM] = models,
            states: dict[str, MemoryState] = states,
        ) -> None:
            with torch.set_grad_enabled(train):
                out = models[name](ids, labels=ids, memory_state=states[name])
                if train:
                    models[name].zero_grad(set_to_none=True)
                    out.loss.backward()

        for train in (False, True):
            times: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(rounds + 1):
                for name, taken in times.items():
                    once = seconds(lambda n=name, t=train, f=run: f(n, t), device)
                    if turn:
                        taken.append(once)
            for name in ("knn gate", "knn joint"):
                ratios = [a / b for a, b in zip(times[name], times["window"], strict=True)]
                row = {
                    "length": length,
                    "memory": name,
                    "task": "forward+backward" if train else "forward",
                    "time_over_window": round(statistics.median(ratios), 3),
                    "lowest": round(min(ratios), 3),
                    "highest": round(max(ratios), 3),
                }
                rows.append(row)
                print(
                    f"{length:7d} {name:10} {row['task']:17} {row['time_over_window']:10.3f} "
                    f"{row['lowest']:7.3f} {row['highest']:8.3f}"
                )
    settings = {
        "hidden": hidden,
        "layers": layers,
        "segment": segment,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }
    write_result(
        out,
        "time of a segment over a full kNN memory, over that with transformer-xl as long",
        settings,
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
