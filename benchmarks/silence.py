"""What it saves to read silent segments without the work of writing: with it over without it.

Each memory is read over real text twice in every round, directly one after the other: once as it is, and
once with every segment run in full. Gates are made as sparse as those of a trained memory: the write
threshold is set where the share `written` of all cells (a layer in a segment) has an open gate. A memory
in one layer is skipped where all rows of the batch are silent, so a batch saves less than a row alone.
Medians of the rounds' ratios of CPU seconds (GPU: device-synchronised seconds).

    python benchmarks/silence.py [--hidden 256 --layers 4 --rows 1 --rows 8 --written 0.05]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from record import write_result
from shapes import Shape, base_model, with_memory
from timing import seconds
from torch import Tensor

from memlm import MemLMForCausalLM
from memlm.memory import available_memories, memory_class
from memlm.memory.parts.gates import GatedMemory
from memlm.segment import cut

SKIPPING = tuple(
    name
    for name in available_memories()
    if name != "none"
    and issubclass(memory_class(name), GatedMemory)
    and memory_class(name).gates_of is not GatedMemory.gates_of
)


def text(rows: int, length: int, device: str) -> Tensor:
    """(rows, length) bytes of the interpreter's own help, from another place in each row."""
    data = "".join(topics[name] for name in sorted(topics)).encode()
    apart = len(data) // rows
    data *= length // len(data) + 2
    found = [list(data[row * apart :][:length]) for row in range(rows)]
    return torch.tensor(found, device=device)


@torch.no_grad()
def openings(model: MemLMForCausalLM, ids: Tensor) -> Tensor:
    """(segments, layers, rows): the largest gate of each."""
    found, state = [], None
    for part in ids.split(model.config.segment_length, 1):
        state = model(part, memory_state=state, logits_to_keep=None).memory_state
        gates = [value for name, value in state.tensors.items() if name.endswith(".opened")]
        found.append(torch.stack(gates))
    return torch.stack(found)


def measure(name: str, shape: Shape, written: float, rounds: int) -> dict[str, Any]:
    """One memory: the ratio, and the share of cells that were skipped."""
    model = with_memory(base_model(shape), name, shape).eval()
    ids = text(shape.batch, shape.segments * shape.segment, shape.device)
    gates = openings(model, ids)
    level = float(gates.flatten().quantile(1 - written)) if written else float("inf")
    model.set_memory_options(write_threshold=level)
    skipped = (gates < level).all(dim=2).float().mean()

    def read() -> None:
        model.read(cut(ids, None, None, shape.segment))

    def read_in_full() -> None:
        with mock.patch("memlm.backbone.silence.may_skip", lambda memory, x: False):
            read()

    read(), read_in_full()
    pairs = []
    for turn in range(rounds):
        order = (read, read_in_full) if turn % 2 else (read_in_full, read)
        spent = {run: seconds(run, shape.device) for run in order}
        pairs.append(spent[read_in_full] / spent[read])
    return {
        "memory": name,
        "rows": shape.batch,
        "written": written,
        "rounds": rounds,
        "segments": shape.segments,
        "skipped": round(float(skipped), 3),
        "speed": round(statistics.median(pairs), 3),
        "lowest": round(min(pairs), 3),
        "highest": round(max(pairs), 3),
    }


def main(
    hidden: int = 256,
    layers: int = 4,
    segment: int = 256,
    segments: int = 12,
    rows: Annotated[list[int] | None, typer.Option(help="rows of a batch")] = None,
    written: Annotated[list[float] | None, typer.Option(help="share of cells that write")] = None,
    rounds: int = 5,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    memory: Annotated[list[str] | None, typer.Option(help="one or more; all by default")] = None,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/silence.json"
    ),
) -> None:
    found = []
    for count in rows or [1, 8]:
        shape = Shape(hidden, layers, segment, segments, count, 256, device, dtype, threads)
        for share in written or [1.0, 0.05, 0.0]:
            for name in memory or SKIPPING:
                found.append(measure(name, shape, share, rounds))
                print(found[-1], flush=True)
    print_table(found)
    settings = {
        "hidden": hidden,
        "layers": layers,
        "segment": segment,
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }
    write_result(
        out,
        "speed of reading with silent segments skipped, over that of running them in full",
        settings,
        found,
    )


def print_table(found: list[dict[str, Any]]) -> None:
    print("| memory | rows | cells that write | cells skipped | speed |")
    print("|---|--:|--:|--:|--:|")
    for row in found:
        print(
            f"| {row['memory']} | {row['rows']} | {row['written']:.0%} | {row['skipped']:.0%} "
            f"| {row['speed']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}) |"
        )


if __name__ == "__main__":
    typer.run(main)
