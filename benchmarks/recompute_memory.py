"""What recomputation keeps of a segment until the backward pass, and what is left of it afterwards.

One model in training mode with activation checkpointing reads a document forward. What malloc has in use
then (glibc's `mallinfo2`: its first arena and what is mapped) is what is kept of the document: the states,
and the graph that torch's checkpoint holds. Python's part is counted by tracemalloc, in a forward run of
its own. After it come whole steps, forward and backward: how far the resident set rises beyond what it was
before them, how much more is in use when they are over, and how many objects Python's collector knows then.
Linux with glibc, on a CPU. Writes JSON.

    python benchmarks/recompute_memory.py [--memory armt --hidden 64 --layers 2 --segment 128 --segments 64]
"""

from __future__ import annotations

import ctypes
import gc
import tracemalloc
from pathlib import Path
from typing import Annotated, Any

import typer
from record import write_result
from shapes import Shape, base_model, tokens, with_memory
from timing import peak_growth
from torch import Tensor

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")


class _MallInfo(ctypes.Structure):
    # What glibc's mallinfo2 returns; the last two fields are of no use here.
    _fields_ = [(name, ctypes.c_size_t) for name in (*FIELDS, "fordblks", "keepcost")]


def in_use() -> int:
    """Bytes that malloc has handed out and not got back."""
    gc.collect()
    ask: Any = ctypes.CDLL(None).mallinfo2
    ask.restype = _MallInfo
    found = ask()
    return int(found.uordblks + found.hblkhd)


def nodes_of(loss: Tensor) -> int:
    """Nodes of the graph behind a loss."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return len(seen)


def main(
    memory: str = "armt",
    hidden: int = 64,
    layers: int = 2,
    segment: int = 128,
    segments: int = 64,
    vocab: int = 1024,
    steps: int = 3,
    out: Annotated[Path, typer.Option(help="where the JSON goes")] = Path(
        "benchmarks/results/recompute_memory.json"
    ),
) -> None:
    shape = Shape(hidden, layers, segment, segments, 1, vocab, "cpu", "float32", 1)
    model = with_memory(base_model(shape), memory, shape).train()
    model.gradient_checkpointing_enable()
    ids = tokens(shape)

    def loss_of(ids: Tensor) -> Tensor:
        loss: Tensor = model(ids, labels=ids, logits_to_keep=None).loss
        return loss

    # Loads code, and makes the gradients, which stay.
    loss_of(ids[:, : 2 * segment]).backward()
    before = in_use()
    loss = loss_of(ids)
    kept, nodes = in_use() - before, nodes_of(loss)
    del loss
    tracemalloc.start()
    loss = loss_of(ids)
    python = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del loss
    row = {
        "memory": memory,
        "kept_bytes_per_segment": round(kept / segments),
        "state_bytes_per_segment": model.init_state(1).nbytes,
        "python_bytes_per_segment": round(python / segments),
        "graph_nodes_per_segment": round(nodes / segments),
        "steps": [],
    }
    for _ in range(steps):
        grown = peak_growth(lambda: loss_of(ids).backward(), "cpu")
        left = in_use() - before
        objects = len(gc.get_objects())
        row["steps"].append({"peak_bytes": grown, "more_in_use_bytes": left, "objects": objects})
    print(row)
    write_result(
        out,
        "bytes kept of a segment until the backward pass under recomputation, and left after a step",
        {
            "hidden": hidden,
            "layers": layers,
            "segment": segment,
            "segments": segments,
            "vocab": vocab,
            "seed": 0,
        },
        [row],
    )


if __name__ == "__main__":
    typer.run(main)
