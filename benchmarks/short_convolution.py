"""Short convolutions as sums of shifted products against torch's own, in CPU seconds.

Rounds alternate in one process: the convolution alone, forward and backward, in several shapes, then a
training step of the shipped model `qa1-5` on random tokens, and reading them. Medians of the ratios, ours
over torch's.

    python benchmarks/short_convolution.py [--rounds 15]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from record import write_result
from timing import seconds

import memlm
from memlm.memory.parts import tokens
from memlm.segment import cut

# Rows, tokens, channels.
SHAPES = ((32, 12, 64), (480, 12, 64), (32, 256, 64), (1, 512, 256))
SIZE = 4


def alone(shape: tuple[int, int, int]) -> Callable[[], None]:
    """A convolution of this shape, five times forward and backward."""
    rows, _, width = shape
    z, before = torch.randn(shape), torch.randn(rows, SIZE - 1, width)
    kernel, weights = torch.randn(width, 1, SIZE), torch.randn(shape)
    given = [x.requires_grad_() for x in (z, kernel, before)]

    def run() -> None:
        for _ in range(5):
            found, _ = tokens.short_convolution(z, kernel, before, None)
            torch.autograd.grad(found, given, weights)

    return run


def training_step(rows: int, segments: int, length: int) -> Callable[[], None]:
    """Forward and backward of `qa1-5` over a batch of short segments."""
    model, _ = memlm.load_pretrained("qa1-5")
    model.train()
    ids = torch.randint(model.config.vocab_size, (rows, segments * length))

    def run() -> None:
        state, total = None, torch.zeros(())
        for part in ids.split(length, 1):
            out = model(part, labels=part, memory_state=state)
            state, total = out.memory_state, total + out.loss
        model.zero_grad()
        total.backward()

    return run


def reading(rows: int, segments: int) -> Callable[[], None]:
    """`qa1-5` reads random tokens, at some of which its gates open."""
    model, _ = memlm.load_pretrained("qa1-5")
    model.eval()
    ids = torch.randint(model.config.vocab_size, (rows, segments * model.segment_length))
    return lambda: model.read(cut(ids, None, None, model.segment_length))


def main(
    rounds: Annotated[int, typer.Option(help="rounds, in each of which both run once")] = 15,
    out: Path = Path(__file__).parent / "results/short_convolution.json",
) -> None:
    """Measure; write the table and its JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {f"alone, {' x '.join(map(str, shape))}": alone(shape) for shape in SHAPES}
    cases["a training step, 32 rows of 10 segments of 12"] = training_step(32, 10, 12)
    cases["a training step, 32 rows of 3 segments of 256"] = training_step(32, 3, 256)
    cases["reading, 10 rows of 8 segments of 256"] = reading(10, 8)
    rows: list[dict[str, Any]] = []
    for name, run in cases.items():
        ratios = []
        for number in range(rounds + 1):
            with mock.patch.object(tokens._Convolution, "apply", tokens._convolve):
                plain = seconds(run, "cpu")
            ours = seconds(run, "cpu")
            if number:  # The first warms up.
                ratios.append(ours / plain)
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        rows.append({"case": name, "median": middle, "lowest": low, "highest": high})
        typer.echo(f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    write_result(
        out, "CPU seconds, as sums of shifted products over torch's own", {"rounds": rounds}, rows
    )


if __name__ == "__main__":
    typer.run(main)
