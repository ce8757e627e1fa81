"""What each memory costs: speed beside `none`, state, and peak memory, all in their default settings.

`none` is the same base model, with the same weights and segments, without a memory. In every round it and
the mechanism run directly after each other; the ratio is taken pair by pair, in CPU seconds (GPU:
device-synchronised seconds), so that a machine whose speed drifts does not decide the result. Training is
forward and backward through all segments. The row `none` compares it with itself: what noise there is.

Peak memory comes from a process of its own per mechanism and task: how far resident memory (GPU: allocated
memory) rises over that of the model just built, gradients included. Parameters and, on a CPU, what Python
and torch keep anyway are not in it; a few MiB of code loaded meanwhile are. Linux only on a CPU.

    python benchmarks/mechanisms.py [--hidden 256 --layers 4 --segment 512 --memory titans-mac ...]
    python benchmarks/mechanisms.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --out FILE
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from record import ON_PLAIN_BASES, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from memlm import MemLMForCausalLM

TASKS = ("forward", "forward+backward")


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


def seconds(run: Callable[[], object], device: str) -> float:
    """CPU seconds of `run`; on a GPU the seconds until the device is done."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_growth(run: Callable[[], object], device: str) -> int | None:
    """Bytes by which memory rises while `run` runs; None where the system does not tell."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # getrusage's ru_maxrss would not do: a child's starts at what its parent held.
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) * 1024


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What `function` of an importable module returns in a new interpreter."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


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


def step(task: str, model: MemLMForCausalLM, ids: Tensor) -> None:
    if task == "forward":
        with torch.no_grad():
            model.eval()(ids, logits_to_keep=None)
        return
    model.zero_grad(set_to_none=True)
    model.train()(ids, labels=ids, logits_to_keep=None).loss.backward()


def peak(name: str, task: str, shape: Shape) -> int | None:
    """Peak memory of one task, in this process and from its first run."""
    model = with_memory(base_model(shape), name, shape)
    ids = tokens(shape)
    step("forward", model, ids[:, :8])  # loads code that is needed whatever the size
    return peak_growth(lambda: step(task, model, ids), shape.device)


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
    memory: Annotated[list[str] | None, typer.Option(help="one or more; all by default")] = None,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/mechanisms.json"
    ),
) -> None:
    shape = Shape(hidden, layers, segment, segments, batch, vocab, device, dtype, threads)
    names = memory or list(ON_PLAIN_BASES)
    peaks = {
        (name, task): in_fresh_process(peak, name, task, shape) for name in names for task in TASKS
    }
    base = base_model(shape)
    bare = with_memory(base, "none", shape)
    models = {name: with_memory(base, name, shape) for name in names}
    ids = tokens(shape)
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        for model in (bare, *models.values()):
            step(task, model, ids)
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(rounds):
            for name, model in models.items():
                # Who goes first alternates.
                pair = {
                    which: seconds(partial(step, task, which, ids), device)
                    for which in ((bare, model) if turn % 2 else (model, bare))
                }
                spent[name].append((pair[bare], pair[model]))
        for name, pairs in spent.items():
            ratios = [without / own for without, own in pairs]
            rows.append(
                {
                    "memory": name,
                    "task": task,
                    "relative_throughput": round(statistics.median(ratios), 3),
                    "lowest": round(min(ratios), 3),
                    "highest": round(max(ratios), 3),
                    # Of the fastest runs: what it is where nothing disturbs.
                    "relative_throughput_of_minima": round(
                        min(p[0] for p in pairs) / min(p[1] for p in pairs), 3
                    ),
                    "tokens_per_second": round(
                        ids.numel() / statistics.median(p[1] for p in pairs)
                    ),
                    "state_bytes_per_row": models[name].init_state(1).nbytes,
                    "parameters": sum(p.numel() for p in models[name].memory.parameters()),
                    "peak_bytes": peaks[name, task],
                }
            )
    print_table(rows)
    settings = {**asdict(shape), "rounds": rounds}
    write_result(
        out,
        "throughput over the same base without memory (1 is no cost), state, peak memory growth",
        settings,
        rows,
    )


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| memory | state, KiB per row | forward | peak, MiB | forward+backward | peak, MiB |")
    print("|---|--:|--:|--:|--:|--:|")
    for name in dict.fromkeys(row["memory"] for row in rows):
        own = [row for row in rows if row["memory"] == name]
        cells = [f"{own[0]['state_bytes_per_row'] / 1024:,.0f}"]
        for row in own:
            cells.append(
                f"{row['relative_throughput']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
            )
            cells.append("-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
