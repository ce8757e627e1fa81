"""From hidden states to what a call returns: the logits that are asked for, and sums of losses.

The head runs once per position. The hidden states whose logits are asked for are gathered segment by
segment, and their share of the loss is computed from the logits that are returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from memlm.output import LogitsNotMade
from memlm.segment import IGNORE, Packing

# Logits that a loss holds at a time, beside what its gradient needs: 128 MiB in float32.
AT_ONCE = 2**25


def collector(
    logits_to_keep: int | Tensor | str | None,
    ids: Tensor,
    packing: Packing | None,
    with_labels: bool,
    segment_length: int,
    keep_with_labels: bool,
) -> Collector:
    """A collector of the logits that are asked for, of ids (B, N) as they were given.

    keep_with_labels: whether "auto" keeps all logits beside the loss (`config.logits_with_labels`).
    """
    total = ids.shape[1]
    if isinstance(logits_to_keep, str) and logits_to_keep == "auto":
        many = with_labels and total > segment_length
        if many and not keep_with_labels:
            return Nothing(LogitsNotMade())
        logits_to_keep = 0
    if logits_to_keep is None:
        return Nothing(None)
    if isinstance(logits_to_keep, Tensor):
        columns = _columns(logits_to_keep, total).to(ids.device)
    elif isinstance(logits_to_keep, str) or logits_to_keep < 0:
        raise ValueError(
            f"logits_to_keep={logits_to_keep!r} must be a count of positions: 0 for all, n for the "
            "last n, None for none; a tensor of positions; or 'auto'"
        )
    elif packing is None and (logits_to_keep == 0 or logits_to_keep >= total):
        return Everything()
    else:
        columns = torch.arange(total, device=ids.device)[-logits_to_keep:]
    return Columns(columns, len(ids), total, packing)


class Collector(Protocol):
    """Takes the hidden states whose logits are asked for, segment by segment."""

    # Whether `add` needs to be called.
    wanted: bool

    def add(self, hidden: Tensor) -> None:
        """Keep what is wanted of the next segment's hidden states (D, T, D)."""

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Shifted targets (D, L), split: those of kept positions in `result`'s order, (D, L) the others."""

    def result(self) -> Tensor | None:
        """(., D) hidden states for the head."""

    def to_columns(self, logits: Tensor | None) -> Any:
        """Logits (., V) of the result, put back into the columns of the batch as it was given."""


class Nothing:
    """No logits; `instead` takes their place."""

    wanted = False

    def __init__(self, instead: LogitsNotMade | None) -> None:
        self.instead = instead

    def add(self, hidden: Tensor) -> None:
        pass

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return None, targets

    def result(self) -> Tensor | None:
        return None

    def to_columns(self, logits: Tensor | None) -> Any:
        return self.instead


class Everything:
    """All positions of a batch without padding."""

    wanted = True

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, hidden: Tensor) -> None:
        self.parts.append(hidden)

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return targets, None

    def result(self) -> Tensor | None:
        return torch.cat(self.parts, dim=1)

    def to_columns(self, logits: Tensor | None) -> Any:
        return logits


class Columns:
    """Some columns of a batch (B, N), whose tokens may stand elsewhere in the packed rows."""

    wanted = True

    def __init__(self, columns: Tensor, batch: int, total: int, packing: Packing | None) -> None:
        if packing is None:
            length = total
            places = torch.arange(batch * total, device=columns.device).view(batch, total)
        else:
            places, length = packing.places(), packing.length
        # A column asked for twice is computed once.
        columns, self.back = columns.unique(return_inverse=True)
        self.shape = batch, len(columns)
        places = places[:, columns].flatten()
        real = (places >= 0).nonzero().squeeze(1)
        # In the order in which segments are added.
        order = (places[real] % length).argsort(stable=True)
        self.slots = real[order]
        self.rows, self.at = places[self.slots] // length, places[self.slots] % length
        self.places = self.at.cpu()
        self.start = self.done = 0
        self.parts: list[Tensor] = []

    def add(self, hidden: Tensor) -> None:
        end = self.start + hidden.shape[1]
        upto = int(torch.searchsorted(self.places, end))
        here = slice(self.done, upto)
        if upto > self.done or not self.parts:
            self.parts.append(hidden[self.rows[here], self.at[here] - self.start])
        self.start, self.done = end, upto

    def split(self, targets: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rest = targets.clone()
        rest[self.rows, self.at] = IGNORE
        return targets[self.rows, self.at], rest

    def result(self) -> Tensor | None:
        return torch.cat(self.parts).unsqueeze(0)

    def to_columns(self, logits: Tensor | None) -> Any:
        assert logits is not None
        logits = logits.squeeze(0)
        found = logits.new_zeros(self.shape[0] * self.shape[1], logits.shape[-1])
        found[self.slots] = logits
        return found.view(*self.shape, -1)[:, self.back]


def _columns(asked: Tensor, total: int) -> Tensor:
    """Columns, from 0 to total - 1, that a tensor of positions or of one bool per column asks for."""
    columns = asked.nonzero().squeeze(-1) if asked.dtype == torch.bool else asked.long()
    fits = asked.ndim == 1 and not asked.is_floating_point() and len(columns) > 0
    fits = fits and (asked.dtype != torch.bool or len(asked) == total)
    if not fits or not -total <= int(columns.min()) <= int(columns.max()) < total:
        raise ValueError(
            f"logits_to_keep has shape {tuple(asked.shape)} and dtype {asked.dtype}; a tensor must hold "
            f"positions (n,) within the {total} of input_ids"
        )
    return columns % total


class Sum:
    """A sum that is None until something is added."""

    value: Tensor | None = None

    def add(self, term: Tensor | None) -> None:
        if term is not None:
            self.value = term if self.value is None else self.value + term


def cross_entropy_in_pieces(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int
) -> Tensor:
    """Nats, summed over targets (N,), of hidden states (N, D) that `head` maps to (., V) logits.

    No more than `AT_ONCE` logits are held at a time: more are computed piece by piece, and with gradients
    once again in backward.
    """

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        return summed_cross_entropy(head(hidden.unsqueeze(0)), targets)

    rows = max(1, AT_ONCE // vocabulary)
    if len(targets) <= rows:
        return loss(hidden, targets)
    total = Sum()
    for piece in zip(hidden.split(rows), targets.split(rows), strict=True):
        again = torch.is_grad_enabled()
        total.add(checkpoint(loss, *piece, use_reentrant=False) if again else loss(*piece))
    assert total.value is not None
    return total.value


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats, summed over the targets (...) that are not ignored; logits (..., V). In float32 or wider."""
    logits = logits.flatten(0, -2)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE, reduction="sum")
