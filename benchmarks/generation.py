"""What a new token costs: `generate` with a memory over that of the bare base model with its cache.

Both continue a prompt of the same length, the memory model after two full segments that it remembers; the
base model knows nothing of them. The prompt fills the open segment up to `positions`; one whose new tokens
do not fit into it crosses a border, at which the segment is committed. Runs are interleaved and the ratio
is taken pair by pair, in CPU seconds (GPU: device-synchronised seconds). `again` is the ratio without the
cache of the open segment. Writes a table and JSON.

    python benchmarks/generation.py [--hidden 256 --layers 6 --segment 512 ...]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from record import ON_PLAIN_BASES, write_result
from timing import seconds
from transformers import AutoModelForCausalLM, LlamaConfig

from memlm import MemLMForCausalLM


def main(
    hidden: int = 256,
    layers: int = 6,
    segment: int = 512,
    positions: Annotated[str, typer.Option(help="tokens in the open segment, by comma")] = "64,440",
    border: Annotated[bool, typer.Option(help="also from where a border is crossed")] = True,
    new: int = 64,
    batch: int = 1,
    vocab: int = 4096,
    rounds: int = 5,
    again: Annotated[bool, typer.Option(help="measure without the cache as well, once")] = True,
    memories: Annotated[str, typer.Option(help="by comma; default: all")] = ",".join(
        ON_PLAIN_BASES
    ),
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/generation.json"
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
    base = AutoModelForCausalLM.from_config(config, dtype=kind).to(device).eval()
    names = memories.split(",")
    models = {
        name: MemLMForCausalLM.from_base(base, memory=name, segment_length=segment).to(device)
        for name in names
    }
    ids = torch.randint(3, vocab, (batch, 3 * segment), device=device)
    states = {
        name: model(ids[:, : 2 * segment], logits_to_keep=None).memory_state.detach()
        for name, model in models.items()
    }
    given: dict[str, Any] = {
        "max_new_tokens": new,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    places = [int(at) for at in positions.split(",")] + [segment - new // 2] * border
    rows = []
    for at in places:
        prompt = ids[:, 2 * segment : 2 * segment + at]

        def bare(prompt: torch.Tensor = prompt) -> None:
            base.generate(prompt, **given)

        def ours(name: str, prompt: torch.Tensor = prompt, **how: Any) -> None:
            models[name].generate(prompt, memory_state=states[name], **given, **how)

        bare()
        pairs: dict[str, list[float]] = {name: [] for name in models}
        speed: dict[str, list[float]] = {name: [] for name in models}
        for name in models:
            ours(name)
        for _ in range(rounds):
            for name in models:
                plain = seconds(bare, device)
                spent = seconds(lambda name=name: ours(name), device)
                pairs[name].append(spent / plain)
                speed[name].append(batch * new / spent)
        for name, model in models.items():
            row = {
                "memory": name,
                "open_tokens": at,
                "crosses_a_border": at + new > segment,
                "cost": round(statistics.median(pairs[name]), 3),
                "lowest": round(min(pairs[name]), 3),
                "highest": round(max(pairs[name]), 3),
                "new_tokens_per_second": round(statistics.median(speed[name]), 1),
                "reruns": model.reruns,
            }
            if again:
                plain = seconds(bare, device)
                row["again"] = round(
                    seconds(lambda n=name: ours(n, use_cache=False), device) / plain, 2
                )
            rows.append(row)
            print(
                f"{name:18} {at:5d} open  cost {row['cost']:6.2f} ({row['lowest']:.2f} to "
                f"{row['highest']:.2f})  without the cache {row.get('again', '')}",
                flush=True,
            )
    settings = {
        "hidden": hidden,
        "layers": layers,
        "segment": segment,
        "new": new,
        "batch": batch,
        "rounds": rounds,
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "seed": 0,
    }
    write_result(
        out,
        "seconds of generate over those of the bare base model with its cache (1 is no cost)",
        settings,
        rows,
    )


if __name__ == "__main__":
    typer.run(main)
