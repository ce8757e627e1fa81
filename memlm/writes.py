"""How often a memory was written while documents were read: the count of its false alarms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# A segment counts as written when a write gate of any layer is above this.
WRITTEN_ABOVE = 0.1


class WriteCount:
    """Counts, for each row, the segments in which a write gate opened beyond `WRITTEN_ABOVE`.

    Give it to `model.read(segments, state, writes=count)`, in as many calls as you like.
    """

    def __init__(self, rows: Sequence[int] | None = None) -> None:
        """rows: what was counted before, as `rows()` gave it."""
        # On the model's device: nothing waits for it while segments are read.
        self._rows = None if rows is None else torch.tensor(rows, dtype=torch.long)

    def add(self, active: Tensor | None, gate: Tensor | None) -> None:
        """Count a segment. active (B,) bool: rows that have it, None for all; gate (B,)."""
        if gate is None:
            return
        written = gate > WRITTEN_ABOVE
        if active is not None:
            written = written & active.to(written.device)
        before = 0 if self._rows is None else self._rows.to(written.device)
        self._rows = before + written.long()

    def copy(self) -> WriteCount:
        """A copy that goes on counting independently."""
        other = WriteCount()
        other._rows = self._rows
        return other

    def rows(self) -> list[int] | None:
        """Segments written, row by row; None where the memories have no gates or nothing was read."""
        return None if self._rows is None else [int(count) for count in self._rows.tolist()]
