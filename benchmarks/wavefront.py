"""The wavefront schedule over the sequential one: seconds of the same call, and what "auto" picks there.

Both run on the same weights (which stand in a stack in both cases), interleaved, and the ratio is taken
pair by pair, in CPU seconds (GPU: device-synchronised seconds). Above 1 the wavefront is faster. Every list
is a grid:

    python benchmarks/wavefront.py --layers 4,16 --hidden 128,256 --segment 128 --rows 1 --segments 2,8,32
    python benchmarks/wavefront.py --device cuda --dtype bfloat16 --layers 16 --hidden 2048 --segment 1024
    --segments 2,4,16,128
"""

from __future__ import annotations

import statistics
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from mechanisms import seconds
from record import write_result
from transformers import AutoModelForCausalLM, LlamaConfig

from memlm import MemLMForCausalLM
from memlm.scheduling import faster


def main(
    layers: str = "4,16",
    hidden: str = "128,512",
    segment: str = "128,512",
    rows: str = "1,8",
    segments: Annotated[str, typer.Option(help="segments of the document")] = "4,32",
    memories: str = "armt",
    tasks: str = "forward,forward+backward",
    vocab: int = 1024,
    rounds: int = 3,
    most_tokens: Annotated[int, typer.Option(help="leave out larger documents")] = 2**20,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/wavefront.json"
    ),
) -> None:
    torch.set_num_threads(threads)
    found = []
    sizes = [[int(one) for one in given.split(",")] for given in (layers, hidden, segment, rows)]
    print(
        f"{'memory':8} {'task':17} {'layers':>6} {'hidden':>6} {'segment':>7} {'rows':>4} {'segments':>8} "
        f"{'ratio':>6} {'lowest':>7} {'highest':>7} auto"
    )
    for memory, (depth, width, length, batch) in product(memories.split(","), product(*sizes)):
        model = _model(memory, depth, width, length, vocab, dtype, device)
        for task, count in product(tasks.split(","), map(int, segments.split(","))):
            if batch * count * length > most_tokens:
                continue
            ids = torch.randint(vocab, (batch, count * length), device=device)
            row = {
                "memory": memory,
                "task": task,
                "layers": depth,
                "hidden": width,
                "segment": length,
                "rows": batch,
                "segments": count,
                **_compare(model, ids, task, rounds, device),
            }
            found.append(row)
            print(
                f"{memory:8} {task:17} {depth:6} {width:6} {length:7} {batch:4} {count:8} "
                f"{row['ratio']:6.2f} {row['lowest']:7.2f} {row['highest']:7.2f} {row['auto']}",
                flush=True,
            )
    settings = {
        "vocab": vocab,
        "rounds": rounds,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "dtype": dtype,
        "threads": threads,
        "seed": 0,
    }
    write_result(
        out, "seconds of the sequential schedule over those of the wavefront", settings, found
    )


def _model(
    memory: str, layers: int, hidden: int, segment: int, vocab: int, dtype: str, device: str
) -> MemLMForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=4 * segment,
    )
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(device)
    return MemLMForCausalLM.from_base(base, memory=memory, segment_length=segment).to(device)


def _compare(
    model: MemLMForCausalLM, ids: torch.Tensor, task: str, rounds: int, device: str
) -> dict[str, object]:
    def run(schedule: str) -> None:
        model.config.schedule = schedule
        if task == "forward":
            with torch.no_grad():
                model(ids, logits_to_keep=None)
        else:
            model.zero_grad(set_to_none=True)
            model(ids, labels=ids, logits_to_keep=None).loss.backward()

    pairs = []
    for turn in range(rounds + 1):
        taken = [seconds(lambda s=s: run(s), device) for s in ("sequential", "wavefront")]
        if turn:
            pairs.append(taken[0] / taken[1])
    model.config.schedule_measured = None
    run("auto")
    return {
        "ratio": round(statistics.median(pairs), 3),
        "lowest": round(min(pairs), 3),
        "highest": round(max(pairs), 3),
        "auto": _picked(model, ids),
    }


def _picked(model: MemLMForCausalLM, ids: torch.Tensor) -> str:
    """What the run under "auto" went by."""
    segments = ids.shape[1] // model.config.segment_length
    measured = model.config.schedule_measured or []
    picked = measured and faster(measured[-1], segments)
    return "wavefront" if picked else "sequential"


if __name__ == "__main__":
    typer.run(main)
