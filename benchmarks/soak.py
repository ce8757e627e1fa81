"""What hours of reading do to a process and to a memory: millions of tokens, thousands of documents.

python benchmarks/soak.py numbers --tokens 10_000_000 --memory armt --dtype bfloat16
python benchmarks/soak.py numbers --table
python benchmarks/soak.py load --minutes 60

numbers: one document of random tokens, so many segments after each other, read by a model of one tiny layer
(recorded with it). After 10^3, 10^4, ... tokens: the largest magnitude and the norm of every tensor of the
state, the largest it had after any window of eight segments since the mark before, and whether the logits
after it are finite. A stream (memory, dtype, text) that is in the JSON is not read again unless more tokens
are asked for. Where it was at the last mark, or when --seconds were over, is kept in the folder --left, and
the next run goes on from there. A tensor grows where its norm at the last mark and the largest it had
before are both more than half as much again as at the mark before. It is dead where next to nothing is left
of it. --defaults takes every memory with its default sizes and scales.
load: documents of random sizes written, asked about, forked, saved, loaded and dropped, one after the other
or four in a pool. Recorded after each tenth and at the end: resident memory, open files, threads, and the
objects that Python's collector knows, which have to be alike once every length has been seen.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from record import write_result
from torch import Tensor

from memlm import DocumentStream, MemLMForCausalLM, MemoryState, StreamPool
from memlm.files import read_json
from memlm.memory import (
    MemoryConfig,
    available_memories,
    config_to_dict,
    memory_class,
    resolve_memories,
)
from memlm.pretrained import load_pretrained
from memlm.retrieval import ChunkIndex, HashingEmbedder
from memlm.segment import Segment

RESULTS = Path(__file__).parent / "results"
# Neural memories that decay by their default of 1% per token are all zero after some thousand tokens of an
# untrained model, and prove nothing.
SLOW = {"initial_forgetting": 1e-3}
# Sizes that are smaller than the defaults, where those are what a stream costs; they are full within the
# first hundred thousand tokens either way.
CHOSEN: dict[str, dict[str, Any]] = {
    "camelot": {"num_modes": 64},
    "hmt": {"queue_size": 20},
    "knn": {"capacity": 512, "layers": [0]},
    "landmark": {"num_blocks": 20},
    "memoryllm": {"pool_size": 64, "num_written": 16},
    "tova": {"memory_length": 64},
    **dict.fromkeys(("omega", "titans-mac", "titans-mag", "titans-mal", "yaad"), SLOW),
}
WINDOW = 8
VOCAB = 256
# What is kept of a tensor at each mark.
SIZES = ("largest", "norm", "peak")
# Tensors that count or describe what was read, and are no memory of it, by the last part of their names.
STATISTICS = frozenset(
    "begun chance lengths load mass opened rate reconstruction share usage written".split()
)
# How much larger than a decade before counts as growth.
GROWTH = 1.5
DEAD = 1e-12


def tiny(memory: str, dtype: torch.dtype, segment: int, defaults: bool) -> MemLMForCausalLM:
    from transformers import LlamaConfig, Mamba2Config

    torch.manual_seed(0)
    shared = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1}
    config = (
        Mamba2Config(**shared, num_heads=2, head_dim=16, state_size=8, n_groups=1, chunk_size=64)
        if memory != "none" and memory_class(memory).site == "recurrence"
        else LlamaConfig(
            **shared,
            intermediate_size=16,
            num_attention_heads=1,
            num_key_value_heads=1,
            max_position_embeddings=4 * segment,
        )
    )
    chosen: Any = memory if defaults else {"name": memory, **CHOSEN.get(memory, {})}
    model = MemLMForCausalLM.from_base(config, memory=chosen, segment_length=segment, dtype=dtype)
    with torch.no_grad():
        # As in the tests: weights large enough to matter, and nothing of a memory at zero.
        for parameter in model.base.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
        for parameter in model.memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def sizes_of(state: MemoryState) -> dict[str, tuple[float, float]]:
    """Largest magnitude and norm of every tensor that is not empty, counters included."""
    found = {name: value.double() for name, value in state.tensors.items() if value.numel()}
    return {name: (float(v.abs().amax()), float(v.norm())) for name, v in found.items()}


class TimeUp(Exception):
    """The seconds are over; where the stream was left is on disk."""


@torch.no_grad()
def numbers(
    asked: dict[str, Any], tokens: int, segment: int, until: float, left: Path
) -> dict[str, Any]:
    """Read one document of `tokens` random tokens, or of one token again and again.

    asked: memory, dtype, text, and whether it is to have its defaults. until: when, on the monotonic clock,
    to write what was reached to the file `left` and raise `TimeUp`.
    """
    asked = {**asked, "segment": segment}
    model = tiny(asked["memory"], getattr(torch, asked["dtype"]), segment, asked["defaults"])
    state = model.init_state(1)
    tensors = {
        name: {"dtype": str(value.dtype)[6:], "shape": list(value.shape)}
        | {size: [] for size in SIZES}
        for name, value in state.tensors.items()
    }
    row: dict[str, Any] = {
        **asked,
        "config": list(map(unusual, resolve_memories(model.config.memory))),
        "tokens": 0,
        "cpu_seconds": 0.0,
        "failed": None,
        "marks": [],
        "logits_finite": [],
        "state": tensors,
    }
    peaks: dict[str, float] = {}
    if left.exists():
        kept, extra = MemoryState.load_with_extra(left)
        found = json.loads(extra["done"])
        if asked.items() <= found["row"].items():
            state, row, peaks = kept, found["row"], found["peaks"]
    began = time.process_time() - row["cpu_seconds"]

    def draw() -> Tensor:
        # By its place, so that a stream that was left goes on as it would have.
        generator = torch.Generator().manual_seed(row["tokens"])
        ids = torch.randint(VOCAB, (1, segment), generator=generator)
        return ids if asked["text"] == "random" else torch.full_like(ids, 7)

    def leave() -> None:
        row["cpu_seconds"] = round(time.process_time() - began, 1)
        left.parent.mkdir(parents=True, exist_ok=True)
        state.save(left, {"done": json.dumps({"row": row, "peaks": peaks})})

    powers = [10**power for power in range(3, 10) if 10**power < tokens]
    reached = row["marks"][-1] if row["marks"] else 0
    try:
        for mark in (mark for mark in [*powers, tokens] if mark > reached):
            while row["tokens"] < mark:
                if time.monotonic() > until:
                    leave()
                    raise TimeUp
                pieces: list[Segment] = []
                while row["tokens"] < mark and len(pieces) < WINDOW:
                    pieces.append(Segment(draw(), None))
                    row["tokens"] += segment
                state = model.read(pieces, state)
                for name, (largest, _) in sizes_of(state).items():
                    peaks[name] = max(peaks.get(name, 0.0), largest)
            logits = model(draw(), memory_state=state, write=False, logits_to_keep=8).logits
            row["marks"].append(row["tokens"])
            row["logits_finite"].append(bool(logits.isfinite().all()))
            for name, (largest, norm) in sizes_of(state).items():
                for size, value in zip(SIZES, (largest, norm, peaks[name]), strict=True):
                    row["state"][name][size].append(float(f"{value:.6g}"))
            peaks = {}
            leave()
    except FloatingPointError as error:
        row["failed"] = f"at {row['tokens']} tokens: {error}"
        row["cpu_seconds"] = round(time.process_time() - began, 1)
    print(shown(row), flush=True)
    return row


def unusual(config: MemoryConfig) -> dict[str, Any]:
    """A config's name, and the fields that are not its mechanism's defaults."""
    usual = type(config)().to_dict()
    return {
        key: value for key, value in config_to_dict(config).items() if usual.get(key, ...) != value
    }


def ratios(row: dict[str, Any], *sizes: str) -> dict[str, float]:
    """Of each tensor that was not zero at the last mark but one: by what it changed since, at least."""
    found = {}
    for name, tensor in row["state"].items():
        pairs = [tensor[size][-2:] for size in sizes]
        if all(len(pair) == 2 and pair[0] > 0 for pair in pairs):
            found[name] = min(last / before for before, last in pairs)
    return found


def growing(row: dict[str, Any]) -> dict[str, float]:
    """Of each tensor that grew from the mark before the last to the last: by what factor.

    By norm and by peak: of a thousand windows the largest is larger than of a hundred, whatever they are.
    """
    return {
        name: round(ratio, 2)
        for name, ratio in ratios(row, "norm", "peak").items()
        if ratio > GROWTH
    }


def dead(row: dict[str, Any]) -> list[str]:
    """The tensors of which less than a share of `DEAD` is left of what they were at an earlier mark."""
    norms = {name: tensor["norm"] for name, tensor in row["state"].items()}
    return [name for name, norm in norms.items() if norm and norm[-1] < DEAD * max(norm)]


def values(row: dict[str, Any]) -> list[str]:
    """The tensors that hold what was read, by name: no counters and no statistics."""
    return [
        name
        for name, tensor in row["state"].items()
        if "float" in tensor["dtype"] and name.split(".")[-1] not in STATISTICS
    ]


def largest(row: dict[str, Any]) -> str:
    """The largest magnitude of `values` at each mark."""
    tensors = [row["state"][name]["largest"] for name in values(row)]
    return ", ".join(f"{max(sizes):.3g}" for sizes in zip(*filter(None, tensors), strict=True))


def shown(row: dict[str, Any]) -> str:
    """One line: how far it went, the largest magnitude at each mark, and what grew."""
    grows = ", ".join(f"{name} x{ratio}" for name, ratio in growing(row).items()) or "nothing"
    return (
        f"{row['memory']}{' (defaults)' * row['defaults']} {row['dtype']} {row['text']}: "
        f"{row['tokens']:,} tokens, {row['cpu_seconds']} s; largest {largest(row)}; grows: {grows}; "
        f"dead: {', '.join(dead(row)) or 'nothing'}; "
        f"finite: {all(row['logits_finite']) and not row['failed']}"
        + (f" ({row['failed']})" if row["failed"] else "")
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/guarantees.md: largest magnitudes by memory and type, and the largest ratio."""
    types = ("float32", "bfloat16")
    lines = [
        "| memory |" + "".join(f" {dtype} | last/before |" for dtype in types),
        "|---" * 5 + "|",
    ]
    found = {(row["memory"], row["dtype"]): row for row in rows if row["text"] == "random"}
    for memory in sorted({memory for memory, _ in found}):
        cells = []
        for row in (found.get((memory, dtype)) for dtype in types):
            changed = ratios(row, "norm") if row else {}
            ratio = (
                max((changed[name] for name in values(row) if name in changed), default=0)
                if row
                else 0
            )
            cells += [largest(row), f"{ratio:.2f}"] if row else ["not run", ""]
        lines.append(f"| `{memory}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def all_numbers(given: argparse.Namespace, out: Path) -> None:
    """Read what is not in `out` yet, float32 first, for about --seconds; written after every stream."""
    rows = read_json(out)["rows"] if out.exists() else []
    if given.table:
        print(table([row for row in rows if row["defaults"] == given.defaults]))
        print("\n".join(map(shown, rows)))
        return
    until = time.monotonic() + given.seconds
    for dtype in given.dtype:
        for memory in given.memory:
            key = {"memory": memory, "dtype": dtype, "text": given.text, "defaults": given.defaults}
            known = [row for row in rows if key.items() <= row.items()]
            if any(row["tokens"] >= given.tokens or row["failed"] for row in known):
                continue
            left = given.left / ("-".join(map(str, key.values())) + ".safetensors")
            try:
                row = numbers(key, given.tokens, given.segment, until, left)
            except TimeUp:
                print("time is up; run again to go on")
                return
            rows = [*(other for other in rows if other not in known), row]
            settings = {"window_of_peaks": WINDOW, "growth": GROWTH, "dead": DEAD}
            write_result(out, (__doc__ or "").splitlines()[0], settings, rows)


def load(minutes: float, seed: int, out: Path) -> None:
    """Documents one after the other, and what the process holds: written at each tenth, and at the end."""
    rng, process = random.Random(seed), psutil.Process()
    model, tokenizer = load_pretrained("qa1")
    pool = StreamPool(model, tokenizer, batch_size=4)
    words = "bird tree stone cloud river house door lamp road boat song salt".split()
    marks: list[dict[str, Any]] = []
    row: dict[str, Any] = {"minutes": minutes, "documents": 0, "characters": 0, "marks": marks}

    def mark(share: float) -> None:
        gc.collect()
        marks.append(
            {
                "share": round(share, 2),
                "documents": row["documents"],
                "resident_megabytes": round(process.memory_info().rss / 2**20, 1),
                "open_files": process.num_fds(),
                "threads": process.num_threads(),
                "objects": len(gc.get_objects()),
                "in_pool": len(pool),
            }
        )
        print(marks[-1], flush=True)
        settings = {"minutes": minutes, "seed": seed}
        write_result(out, (__doc__ or "").splitlines()[0], settings, [row])

    def drawn() -> str:
        return " ".join(rng.choice(words) for _ in range(int(10 ** rng.uniform(1, 4)))) + ". "

    def asked(stream: DocumentStream, text: str) -> None:
        stream.write("John moved to the kitchen. ")
        stream.ask("Where is John?", max_new_tokens=3)
        stream.fork().write(text[:200])
        row["documents"] += 1
        row["characters"] += len(text)

    def single(place: Path) -> None:
        number, text = row["documents"], drawn()
        index = ChunkIndex(HashingEmbedder(256)) if number % 3 == 0 else None
        stream = DocumentStream(model, tokenizer, index)
        stream.write(text)
        if number % 4 == 0:
            stream.save(place)
            stream = DocumentStream.load(place, model, tokenizer, HashingEmbedder(256))
            shutil.rmtree(place)
        asked(stream, text)

    def together() -> None:
        texts = [drawn() for _ in range(4)]
        streams = [pool.open() for _ in texts]
        for stream, text in zip(streams, texts, strict=True):
            stream.write(text)
        pool.run()
        for stream, text in zip(streams, texts, strict=True):
            asked(stream, text)

    began, tenth, turn = time.monotonic(), 1, 0
    with tempfile.TemporaryDirectory() as folder:
        while (share := (time.monotonic() - began) / (60 * minutes)) < 1:
            together() if turn % 10 == 9 else single(Path(folder) / "stream")
            turn += 1
            if share >= tenth / 10:
                tenth = int(10 * share) + 1
                mark(share)
    mark(1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["numbers", "load"])
    parser.add_argument("--memory", nargs="+", default=list(available_memories()))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--text", choices=["random", "one-token"], default="random")
    parser.add_argument("--defaults", action="store_true")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--left",
        type=Path,
        default=Path(tempfile.gettempdir()) / "memlm-soak",
        help="folder for the states of streams",
    )
    parser.add_argument("--table", action="store_true", help="print what is in the JSON")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    out = given.out or RESULTS / f"soak_{given.what}.json"
    if given.what == "numbers":
        all_numbers(given, out)
        return
    load(given.minutes, given.seed, out)


if __name__ == "__main__":
    main()
