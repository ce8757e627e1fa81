"""Training on long documents: speed and peak memory by segments, with and without recomputation.

One document, forward and backward through all of its segments (bptt_depth is the whole document).
Recomputing keeps the state at each segment's border and runs every segment again in backward, so that the
activations of one segment are held at a time. Logits of a large vocabulary are computed in pieces of at
most `memlm.logits.AT_ONCE` numbers; --logits-at-once sets another limit. Peak memory comes from a process
of its own: how far it rises above the model just built, gradients included. `states`: bytes of the states
at all borders.

    python benchmarks/training.py [--memory armt --segments 2,8,64]
    python benchmarks/training.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --out FILE
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from record import write_result
from shapes import Shape, base_model, tokens, with_memory
from timing import in_fresh_process, peak_growth, seconds

from memlm import logits


def measure(name: str, shape: Shape, recompute: bool, at_once: int | None) -> dict[str, Any]:
    """One document, in this process and from its first run."""
    if at_once:
        logits.AT_ONCE = at_once
    model = with_memory(base_model(shape), name, shape).train()
    if recompute:
        model.gradient_checkpointing_enable()
    ids = tokens(shape)
    short = ids[:, : 2 * shape.segment]

    def step(ids: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(ids, labels=ids, logits_to_keep=None).loss.backward()

    step(short[:, :8])  # loads code that is needed whatever the size
    spent = 0.0

    def timed() -> None:
        nonlocal spent
        spent = seconds(lambda: step(ids), shape.device)

    peak = peak_growth(timed, shape.device)
    return {
        "memory": name,
        "segments": shape.segments,
        "recompute": recompute,
        "tokens_per_second": round(ids.numel() / spent),
        "peak_bytes": peak,
        "states_bytes": shape.segments * model.init_state(shape.batch).nbytes,
    }


def main(
    memory: Annotated[str, typer.Option(help="by comma")] = "armt",
    segments: Annotated[str, typer.Option(help="numbers of segments, by comma")] = "2,8,32,64",
    most_without: Annotated[int, typer.Option(help="no more segments without recomputing")] = 32,
    hidden: int = 128,
    layers: int = 4,
    segment: int = 256,
    batch: int = 1,
    vocab: int = 4096,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    logits_at_once: Annotated[int | None, typer.Option(help="another limit than usual")] = None,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/training.json"
    ),
) -> None:
    rows = []
    for name in memory.split(","):
        for count in map(int, segments.split(",")):
            shape = Shape(hidden, layers, segment, count, batch, vocab, device, dtype, threads)
            for recompute in (False, True):
                if recompute or count <= most_without:
                    rows.append(in_fresh_process(measure, name, shape, recompute, logits_at_once))
                    print(rows[-1], flush=True)
    settings = {k: v for k, v in asdict(shape).items() if k != "segments"}
    settings["logits_at_once"] = logits_at_once or logits.AT_ONCE
    write_result(out, "training by segments: tokens per second, peak memory growth", settings, rows)


if __name__ == "__main__":
    typer.run(main)
