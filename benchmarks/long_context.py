"""Time and peak memory by the length of a document: a memory, a sliding window, and full attention.

The same layers read one document: in segments with a memory; in half segments, each token seeing at most a
segment back and at least half of one (the evaluation's baseline "window"); and as a whole, each token
seeing all before it. Each run has a process of its own. A way is
not tried beyond the first length that failed or took longer than --most-seconds. Writes JSON and a plot.

    python benchmarks/long_context.py [--lengths 4k,16k,64k,256k --memory armt]
    python benchmarks/long_context.py --device cuda --dtype bfloat16 --hidden 2048 --layers 16 --out FILE
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from record import write_result
from timing import in_fresh_process, peak_growth, seconds
from transformers import AutoModelForCausalLM, MistralConfig

from memlm import MemLMForCausalLM
from memlm.memory import TransformerXLConfig
from memlm.segment import cut
from memlm.tasks.lengths import format_length, parse_length

WAYS = ("memory", "window", "full")


def measure(way: str, memory: str, length: int, sizes: dict[str, Any]) -> dict[str, Any]:
    """One reading of a document, in this process and from its first run."""
    torch.set_num_threads(sizes["threads"])
    torch.manual_seed(0)
    device, segment = sizes["device"], sizes["segment"]
    config = MistralConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["hidden"] * 11 // 4,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=max(1, sizes["hidden"] // 64),
        num_key_value_heads=max(1, sizes["hidden"] // 64),
        max_position_embeddings=max(length, 4 * segment),
        sliding_window=None,
    )
    kind = getattr(torch, sizes["dtype"])
    base = AutoModelForCausalLM.from_config(config, dtype=kind).to(device).eval()
    model: Any = base
    if way == "window":
        segment //= 2
    if way != "full":
        chosen = memory if way == "memory" else TransformerXLConfig(memory_length=segment)
        model = MemLMForCausalLM.from_base(base, memory=chosen, segment_length=segment).to(device)
    ids = torch.randint(sizes["vocab"], (1, length), device=device)

    @torch.no_grad()
    def read(ids: torch.Tensor) -> None:
        if way != "full":
            model.read(cut(ids, None, None, segment))
        else:
            model(ids, use_cache=False, logits_to_keep=1)

    read(ids[:, :16])  # loads code that is needed whatever the size
    spent = 0.0

    def timed() -> None:
        nonlocal spent
        spent = seconds(lambda: read(ids), device)

    peak = peak_growth(timed, device)
    return {"way": way, "tokens": length, "seconds": round(spent, 3), "peak_bytes": peak}


def main(
    lengths: Annotated[str, typer.Option(help="by comma")] = "4k,16k,64k,256k",
    ways: Annotated[str, typer.Option(help="by comma")] = ",".join(WAYS),
    memory: str = "armt",
    hidden: int = 128,
    layers: int = 4,
    segment: int = 512,
    vocab: int = 4096,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    most_seconds: Annotated[float, typer.Option(help="no longer lengths after this")] = 60.0,
    out: Annotated[Path, typer.Option(help="where the JSON goes; the plot beside it")] = Path(
        "benchmarks/results/long_context.json"
    ),
) -> None:
    sizes = {
        "hidden": hidden,
        "layers": layers,
        "segment": segment,
        "vocab": vocab,
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }
    rows: list[dict[str, Any]] = []
    for way in ways.split(","):
        for length in map(parse_length, lengths.split(",")):
            try:
                row = in_fresh_process(measure, way, memory, length, sizes)
            except Exception as error:
                row = {"way": way, "tokens": length, "failed": f"{type(error).__name__}: {error}"}
            rows.append(row)
            print(row, flush=True)
            if "failed" in row or row["seconds"] > most_seconds:
                break
    settings = {**sizes, "memory": memory, "most_seconds": most_seconds}
    write_result(out, "time and peak memory growth by length of a document", settings, rows)
    plot(rows, out.with_suffix(".png"))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    found = [row for row in rows if "seconds" in row]
    for way in dict.fromkeys(row["way"] for row in found):
        own = [row for row in found if row["way"] == way]
        tokens = [row["tokens"] for row in own]
        left.loglog(tokens, [row["seconds"] for row in own], "o-", label=way)
        right.loglog(tokens, [(row["peak_bytes"] or 0) / 2**20 for row in own], "o-", label=way)
    for axes, label in ((left, "seconds"), (right, "peak memory, MiB")):
        axes.set(xlabel="tokens", ylabel=label)
        ticks = sorted({row["tokens"] for row in found})
        axes.set_xticks(ticks, [format_length(tick) for tick in ticks])
        axes.minorticks_off()
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"written: {path}")


if __name__ == "__main__":
    typer.run(main)
