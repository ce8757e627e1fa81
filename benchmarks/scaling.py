"""How many tokens per second a pool of streams reads, by the number of streams.

Every stream has the same text, whose full segments are read, 64 streams at most side by side. The figure is
tokens of all streams per CPU second (GPU: second), and its ratio to one stream alone; rounds interleaved.

    python benchmarks/scaling.py [MODEL] [--streams 1,4,16,64,256]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from record import write_result
from timing import seconds

from memlm import StreamPool, load_pretrained


def main(
    model: Annotated[str, typer.Argument(help="a shipped model's name")] = "qa1",
    streams: Annotated[str, typer.Option(help="by comma")] = "1,4,16,64,256",
    tokens: Annotated[int, typer.Option(help="of each stream, about")] = 3000,
    rounds: int = 3,
    device: str = "cpu",
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/scaling.json"
    ),
) -> None:
    torch.set_num_threads(threads)
    reader, tokenizer = load_pretrained(model)
    reader = reader.to(device).eval()
    text = " ".join(f"Mary went to the kitchen. John took the {n}." for n in range(tokens))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    text = tokenizer.decode(ids)
    counts = [int(count) for count in streams.split(",")]
    found: dict[int, list[float]] = {count: [] for count in counts}
    for turn in range(rounds + 1):
        for count in counts:
            pool = StreamPool(reader, tokenizer)
            opened = [pool.open() for _ in range(count)]
            for stream in opened:
                stream.write(text)
            read = pool.waiting * reader.segment_length
            if not read:
                raise typer.BadParameter(
                    f"--tokens {tokens} does not fill a segment of {reader.segment_length}; give more"
                )
            spent = seconds(pool.run, device)
            if turn:  # the first one warms up
                found[count].append(read / spent)
    rows: list[dict[str, Any]] = []
    for count, speeds in found.items():
        ratios = [speed / alone for speed, alone in zip(speeds, found[counts[0]], strict=True)]
        rows.append(
            {
                "streams": count,
                "tokens_per_second": round(statistics.median(speeds)),
                "over_the_first": round(statistics.median(ratios), 2),
                "lowest": round(min(ratios), 2),
                "highest": round(max(ratios), 2),
            }
        )
        print(rows[-1])
    settings = {
        "model": model,
        "segment": reader.segment_length,
        "tokens": len(ids),
        "rounds": rounds,
        "device": device,
        "threads": threads,
    }
    write_result(out, "tokens per second of a pool of streams, by their number", settings, rows)


if __name__ == "__main__":
    typer.run(main)
