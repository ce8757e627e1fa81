"""An evaluation that reads samples of all lengths side by side, over one that reads cell by cell.

    python benchmarks/evaluation.py --lengths 1k 2k 4k 8k 16k 32k 64k --samples 3

The shipped model on the same samples, answers compared: CPU seconds of reading each task and length by
itself, as batches of one cell, over those of reading all of them together. Interleaved pairs in one
process.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from record import write_result
from timing import seconds

import memlm
from memlm.eval import evaluate
from memlm.eval.log import read_rows
from memlm.eval.running import runner
from memlm.eval.running.batches import Batch, joined


def cell_by_cell(batches: Sequence[Batch]) -> list[Batch]:
    """A batch for each task and length."""
    cells = itertools.groupby(batches, key=lambda batch: batch.keys[0][:2])
    return [batch for _, cell in cells for batch in joined(list(cell))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["qa1"])
    parser.add_argument("--lengths", nargs="+", default=["1k", "2k", "4k", "8k", "16k", "32k"])
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results/evaluation.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = memlm.load_pretrained("qa1")
    folder = args.out.parent / f"evaluation-{time.time_ns()}"
    found: dict[str, dict[tuple, str]] = {}

    def run(name: str) -> float:
        out = folder / f"{name}-{len(list(folder.glob('*')))}"
        split = cell_by_cell if name == "cells" else joined

        def work() -> None:
            with patch.object(runner, "joined", split):
                evaluate(
                    model, tokenizer, args.tasks, args.lengths, args.samples,
                    batch_size=args.batch_size, out=out, progress=False,
                )  # fmt: skip

        taken = seconds(work, "cpu")
        rows = read_rows(out / "samples.jsonl", ("task", "length", "index"))
        found[name] = {(r["task"], r["length"], r["index"]): r["output"] for r in rows}
        for path in out.iterdir():
            path.unlink()
        out.rmdir()
        return taken

    folder.mkdir()
    try:
        # What is made once, such as the haystack.
        with patch.object(args, "lengths", args.lengths[:1]):
            run("cells")
        pairs = [(run("cells"), run("mixed")) for _ in range(args.rounds)]
    finally:
        folder.rmdir()
    ratios = [cells / mixed for cells, mixed in pairs]
    same = sum(found["cells"][key] == found["mixed"][key] for key in found["cells"])
    row = {
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "seconds": pairs,
        "answers": len(found["cells"]),
        "same_answers": same,
    }
    print(f"{row['ratio']:.2f} ({row['lowest']:.2f} to {row['highest']:.2f}), {same} of "
          f"{row['answers']} answers are the same")  # fmt: skip
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    what = "CPU seconds of an evaluation cell by cell over those of one that mixes lengths"
    write_result(args.out, what, settings, [row])


if __name__ == "__main__":
    main()
