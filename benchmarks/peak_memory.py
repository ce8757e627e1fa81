"""Peak resident memory of a stream at 64k and at 1M tokens: it should be the same.

Each length runs in a process of its own, so that one's peak is not the other's. Text comes from the
builtin haystack, repeated. Writes a table and JSON.

    python benchmarks/peak_memory.py [--memory armt --lengths 65536 --lengths 1048576]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer


def child(memory: str, tokens: int, hidden: int, layers: int, segment: int) -> None:
    import numpy as np
    import torch
    from transformers import LlamaConfig

    from memlm import DocumentStream, MemLMForCausalLM
    from memlm.tasks.haystack import Haystack
    from memlm.train.tokenizer import train_tokenizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    haystack = Haystack.open("builtin", "all")
    texts = list(islice(haystack.sentences(np.random.default_rng(0)), 4000))
    tokenizer = train_tokenizer(texts, vocab_size=2048)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=2 * segment,
    )
    model = MemLMForCausalLM.from_base(config, memory=memory, segment_length=segment)
    stream = DocumentStream(model, tokenizer)

    def pages() -> Iterator[str]:
        # Enough text for the tokens asked for; the stream is stopped by its own count.
        for sentence in haystack.sentences(np.random.default_rng(1)):
            if stream._committed >= tokens:
                return
            yield " " + sentence

    start, cpu = time.perf_counter(), time.process_time()
    stream.write(pages())
    print(
        json.dumps(
            {
                "memory": memory,
                "tokens": stream.tokens_seen,
                "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "state_bytes": stream.memory_bytes,
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "wall_seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


def main(
    memory: str = "armt",
    lengths: list[int] = [65536, 1048576],  # noqa: B006 - typer reads the default
    hidden: int = 64,
    layers: int = 2,
    segment: int = 256,
    run_child: Annotated[int, typer.Option(hidden=True)] = 0,
    out: Path = Path("benchmarks/results/peak_memory.json"),
) -> None:
    if run_child:
        child(memory, run_child, hidden, layers, segment)
        return
    rows = []
    for length in lengths:
        command = [sys.executable, __file__, "--memory", memory, "--run-child", str(length)]
        command += ["--hidden", str(hidden), "--layers", str(layers), "--segment", str(segment)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        row = rows[-1]
        print(
            f"{row['tokens']:>10,} tokens  peak {row['peak_resident_bytes'] / 2**20:7.1f} MiB  "
            f"state {row['state_bytes']:,} bytes  {row['cpu_seconds']} CPU s"
        )
    ratio = rows[-1]["peak_resident_bytes"] / rows[0]["peak_resident_bytes"]
    print(f"longest over shortest: {ratio:.3f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"rows": rows, "ratio": round(ratio, 4)}, indent=2) + "\n")
    print(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
