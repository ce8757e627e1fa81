"""What hours of reading do to a process and to a memory: millions of tokens, thousands of documents.

python benchmarks/soak.py numbers --tokens 10_000_000 --memory armt --dtype bfloat16
python benchmarks/soak.py load --minutes 60

numbers: one document of so many random tokens, read by a tiny model segment by segment. Recorded every so
often: the largest magnitude in the state, whether all of it is finite, and that of the logits after it.
load: documents of random sizes written, asked about, saved, loaded and dropped, one after the other.
Recorded: resident memory and open files after the first tenth and at the end, which have to be alike.
"""

from __future__ import annotations

import argparse
import gc
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from record import ON_PLAIN_BASES, write_result

from memlm import DocumentStream, MemLMForCausalLM
from memlm.pretrained import load_pretrained
from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.segment import Segment

RESULTS = Path(__file__).parent / "results"


def tiny(memory: str, dtype: torch.dtype, segment: int) -> MemLMForCausalLM:
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=4 * segment,
    )  # fmt: skip
    model = MemLMForCausalLM.from_base(config, memory=memory, segment_length=segment, dtype=dtype)
    with torch.no_grad():
        # A memory that starts at zero would prove nothing.
        for parameter in model.memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def numbers(
    memory: str, dtype: str, tokens: int, segment: int, rows: int, minutes: float
) -> dict[str, Any]:
    """Read until `tokens` are read or the time is up; each of `rows` is a document of its own."""
    model = tiny(memory, getattr(torch, dtype), segment)
    generator = torch.Generator().manual_seed(1)
    state, read, marks = model.init_state(rows), 0, []
    began, cpu, mark_at = time.monotonic(), time.process_time(), segment
    while read < tokens and time.monotonic() - began < 60 * minutes:
        pieces = [
            Segment(torch.randint(256, (rows, segment), generator=generator), None)
            for _ in range(8)
        ]
        state = model.read(pieces, state)
        read += 8 * segment
        if read >= mark_at or read >= tokens:
            mark_at = 2 * read
            largest = state.largest()
            ids = torch.randint(256, (rows, segment), generator=generator)
            logits = model(ids, memory_state=state, write=False).logits
            marks.append(
                {
                    "tokens": read,
                    "largest": float(largest.max()) if largest.numel() else 0.0,
                    "finite": bool(largest.isfinite().all() and logits.isfinite().all()),
                    "largest_logit": float(logits.abs().max()),
                }
            )
            print(memory, dtype, marks[-1], flush=True)
    return {
        "memory": memory,
        "dtype": dtype,
        "tokens_in_a_document": read,
        "documents": rows,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "marks": marks,
    }


def load(minutes: float, seed: int) -> dict[str, Any]:
    """Documents one after the other; what the process holds early on, and at the end."""
    rng, process = random.Random(seed), psutil.Process()
    model, tokenizer = load_pretrained("qa1")
    words = "bird tree stone cloud river house door lamp road boat song salt".split()
    began, marks, documents, characters = time.monotonic(), [], 0, 0
    at = 0.1
    with tempfile.TemporaryDirectory() as folder:
        while (passed := (time.monotonic() - began) / (60 * minutes)) < 1:
            index = ChunkIndex(HashingEmbedder(256)) if documents % 3 == 0 else None
            stream = DocumentStream(model, tokenizer, index)
            text = " ".join(rng.choice(words) for _ in range(int(10 ** rng.uniform(1, 4)))) + ". "
            stream.write(text)
            stream.write("John moved to the kitchen. ")
            stream.ask("Where is John?", max_new_tokens=3)
            if documents % 4 == 0:
                place = Path(folder) / str(documents)
                stream.save(place)
                stream = DocumentStream.load(place, model, tokenizer, HashingEmbedder(256))
                shutil.rmtree(place)
            stream.fork().write(text[:200])
            documents, characters = documents + 1, characters + len(text)
            if passed >= at:
                at += 0.1
                gc.collect()
                marks.append(
                    {
                        "share": round(passed, 2),
                        "documents": documents,
                        "resident_megabytes": round(process.memory_info().rss / 2**20, 1),
                        "open_files": process.num_fds(),
                        "threads": process.num_threads(),
                    }
                )
                print(marks[-1], flush=True)
    return {"minutes": minutes, "documents": documents, "characters": characters, "marks": marks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["numbers", "load"])
    parser.add_argument("--memory", nargs="+", default=list(ON_PLAIN_BASES))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--segment", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out or RESULTS / f"soak_{given.what}.json"
    if given.what == "load":
        rows = [load(given.minutes, given.seed)]
    else:
        rows = [
            numbers(memory, dtype, given.tokens, given.segment, given.rows, given.minutes)
            for memory in given.memory
            for dtype in given.dtype
        ]
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    write_result(out, (__doc__ or "").splitlines()[0], settings, rows)


if __name__ == "__main__":
    main()
