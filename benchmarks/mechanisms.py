"""What each memory costs: speed, state, and peak memory, all in their default settings.

The comparison is `none`: the same base model, with the same weights and segments, without a memory; or,
with --against base, the bare base model called segment by segment, which knows nothing of memlm. In every
round it and the mechanism run directly after each other; the ratio is taken pair by pair, in CPU seconds
(GPU: device-synchronised seconds), so that a machine whose speed drifts does not decide the result.
Training is forward and backward through all segments. The row `none` shows what noise there is.

Bound: the multiplications of the comparison over those of the mechanism, in products of matrices, as they
are counted when it runs (`timing.multiplications`; what is done element by element is not in it). Where the
mechanism's equations are in `equations.py`, `needed` is the share of those multiplications that they ask
for. Of bound: the throughput over the bound. Share of peak: the mechanism's multiplications per second over
those of one large product here.

Peak memory comes from a process of its own per mechanism and task: how far resident memory (GPU: allocated
memory) rises over that of the model just built, gradients included. Parameters and, on a CPU, what Python
and torch keep anyway are not in it; a few MiB of code loaded meanwhile are. Linux only on a CPU.

    python benchmarks/mechanisms.py [--hidden 256 --layers 4 --segment 512 --memory titans-mac ...]
    python benchmarks/mechanisms.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --out FILE
"""

from __future__ import annotations

import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from equations import needed
from record import ON_PLAIN_BASES, write_result
from shapes import Shape, base_model, tokens, with_memory
from timing import (
    in_fresh_process,
    multiplications,
    peak_growth,
    peak_multiplications,
    seconds,
)
from torch import Tensor, nn

from memlm import MemLMForCausalLM

TASKS = ("forward", "forward+backward")


def step(task: str, model: nn.Module, ids: Tensor, segment: int) -> None:
    """One task on a model with memories, or segment by segment on a bare base."""
    ours = isinstance(model, MemLMForCausalLM)
    pieces = (ids,) if ours else ids.split(segment, dim=1)
    model.train(task != "forward")
    if task == "forward":
        with torch.no_grad():
            for piece in pieces:
                # A logit is asked for: a document that is only read skips the layers above its last memory.
                more = {} if ours else {"use_cache": False}
                model(piece, logits_to_keep=1, **more)
        return
    model.zero_grad(set_to_none=True)
    for piece in pieces:
        more = {"logits_to_keep": None} if ours else {"use_cache": False}
        model(piece, labels=piece, **more).loss.backward()


def peak(name: str, task: str, shape: Shape) -> int | None:
    """Peak memory of one task, in this process and from its first run."""
    model = with_memory(base_model(shape), name, shape)
    ids = tokens(shape)
    step("forward", model, ids[:, :8], shape.segment)  # loads code that is needed whatever the size
    return peak_growth(lambda: step(task, model, ids, shape.segment), shape.device)


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
    against: Annotated[str, typer.Option(help="`none`, or the bare `base`")] = "none",
    peaks: Annotated[bool, typer.Option(help="peak memory as well, a process each")] = True,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/mechanisms.json"
    ),
) -> None:
    shape = Shape(hidden, layers, segment, segments, batch, vocab, device, dtype, threads)
    names = memory or list(ON_PLAIN_BASES)
    most = {
        (name, task): in_fresh_process(peak, name, task, shape) if peaks else None
        for name in names
        for task in TASKS
    }
    base = base_model(shape)
    if against not in ("none", "base"):
        raise typer.BadParameter(f"--against {against} is unknown; use none or base")
    bare = with_memory(base, "none", shape) if against == "none" else base
    models = {name: with_memory(base, name, shape) for name in names}
    ids = tokens(shape)
    per_second = peak_multiplications(device, dtype)
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        counts = {
            model: multiplications(partial(step, task, model, ids, segment))
            for model in (bare, *models.values())
        }
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(rounds):
            for name, model in models.items():
                # Who goes first alternates.
                pair = {
                    which: seconds(partial(step, task, which, ids, segment), device)
                    for which in ((bare, model) if turn % 2 else (model, bare))
                }
                spent[name].append((pair[bare], pair[model]))
        for name, pairs in spent.items():
            model = models[name]
            ratios = [without / own for without, own in pairs]
            usual = statistics.median(own for _, own in pairs)
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
                    "bound": round(counts[bare] / counts[model], 3),
                    "needed": share_needed(name, model, task, counts[model], shape),
                    "share_of_peak": round(counts[model] / usual / per_second, 3),
                    "tokens_per_second": round(ids.numel() / usual),
                    "state_bytes_per_row": model.init_state(1).nbytes,
                    "parameters": sum(p.numel() for p in model.memory.parameters()),
                    "peak_bytes": most[name, task],
                }
            )
    print_table(rows)
    settings = {**asdict(shape), "rounds": rounds, "against": against}
    write_result(
        out,
        "throughput over the same base without memory (1 is no cost), state, peak memory growth",
        settings,
        rows,
    )


def share_needed(
    name: str, model: MemLMForCausalLM, task: str, counted: int, shape: Shape
) -> float | None:
    """What the equations need of the multiplications that were counted; None where no line says."""
    if task != "forward":
        return None
    found = needed(name, model, shape.segment, shape.batch, shape.segments)
    return None if found is None else round(found / counted, 3)


def print_table(rows: list[dict[str, Any]]) -> None:
    one = "bound | of bound | of peak | peak, MiB"
    print(f"| memory | state, KiB per row | forward | {one} | forward+backward | {one} |")
    print("|---|--:" + "|--:" * 10 + "|")
    for name in dict.fromkeys(row["memory"] for row in rows):
        own = [row for row in rows if row["memory"] == name]
        cells = [f"{own[0]['state_bytes_per_row'] / 1024:,.0f}"]
        for row in own:
            cells.append(
                f"{row['relative_throughput']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f})"
            )
            share = row["relative_throughput"] / row["bound"]
            cells += [f"{row['bound']:.2f}", f"{share:.0%}", f"{row['share_of_peak']:.0%}"]
            cells.append("-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    typer.run(main)
