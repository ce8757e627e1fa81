"""What a document's memory starts from in training: nothing, or what other documents left.

A memory that has only seen the states of short documents fails beyond the trained length, since the states
of long ones are unlike them. Starting from states that were left elsewhere shows it such states at no cost
(state passing and carried states of Buitrago and Gu 2025, *Understanding and Improving Length
Generalization in Recurrent Models*; Hwang et al. 2024, *TransformerFAM*, appendix B).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from memlm.state import MemoryState

INITIAL_STATES = ("zero", "pass", "carry", "fitted")


def check_initial_state(kind: str, probability: float, rows: int) -> None:
    """ValueError on an unknown or impossible way to start. rows: of a batch, per device."""
    if kind not in INITIAL_STATES:
        names = ", ".join(map(repr, INITIAL_STATES))
        raise ValueError(f"initial_state={kind!r} is unknown; use one of {names}")
    if not 0 <= probability <= 1:
        raise ValueError(f"initial_state_probability={probability} must lie between 0 and 1")
    if kind in ("pass", "fitted") and rows < 2:
        raise ValueError(
            f"initial_state={kind!r} takes the states of a batch's other rows; use "
            "per_device_train_batch_size=2 or more, or initial_state='carry'"
        )


def check_fits(kind: str, start: MemoryState) -> None:
    """ValueError when states like `start` cannot be drawn at random."""
    counted = [name for name, value in start.tensors.items() if not value.is_floating_point()]
    if kind == "fitted" and counted:
        raise ValueError(
            f"initial_state='fitted' cannot draw the memory's {counted[0]!r}, which counts; use 'pass' or "
            "'carry'"
        )


def initial_state(
    kind: str,
    probability: float,
    fresh: MemoryState,
    left: MemoryState | None,
    seed: tuple[int, ...],
) -> MemoryState:
    """The states that documents of a batch start from: `fresh` (rows B), or, with `probability`, others.

    left: the states at the end of an earlier batch, of any number of rows; None before there is one.
    "carry" goes on from the row's own state, "pass" from another row's, "fitted" draws every number from a
    normal distribution with the mean and standard deviation over the rows, cut at their extremes. Detached.
    seed: of the random draws.
    """
    if kind == "zero" or left is None or not probability:
        return fresh
    generator = torch.Generator().manual_seed(
        int(np.random.SeedSequence(seed).generate_state(1)[0])
    )
    rows = fresh.batch_size
    chosen = torch.rand(rows, generator=generator) < probability
    if not bool(chosen.any()):
        return fresh
    if kind == "fitted":
        other = left.map(lambda value: _drawn(value, rows, generator), rows)
    else:
        source = torch.arange(rows) % left.batch_size
        if kind == "pass":
            # Rows rotated by a random step: no row gets its own state.
            step = torch.randint(1, max(left.batch_size, 2), (), generator=generator)
            source = (source + step) % left.batch_size
        other = left.select(source)
    device = next(iter(fresh.tensors.values())).device if fresh.tensors else None
    return other.detach().where(chosen if device is None else chosen.to(device), fresh)


def _drawn(value: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """(rows, ...) numbers like those of `value` (B, ...), element by element."""
    noise = torch.randn(rows, *value.shape[1:], generator=generator, dtype=torch.float64)
    mean, deviation = value.mean(dim=0), value.std(dim=0)
    drawn = mean + deviation * noise.to(value.device, value.dtype)
    return drawn.clamp(value.amin(dim=0), value.amax(dim=0))
