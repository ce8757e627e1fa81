"""Several processes on one evaluation: each takes its share of the batches, and process 0 joins the rows.

Started by `accelerate launch` or torchrun. Processes meet, but send each other nothing: what one of them
found is in a file of its own, `samples-RANK.jsonl` and `skipped-RANK.json`, which outlives it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from memlm.files import read_json, write_json

Item = TypeVar("Item")
# How long one waits for the slowest: a document may take hours.
PATIENCE = timedelta(days=30)
Skipped = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Processes:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those that the launcher started; one where there was none."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        return cls(state.process_index, state.num_processes)

    @property
    def first(self) -> bool:
        """Whether this process writes what all share."""
        return self.rank == 0

    @property
    def part(self) -> int | None:
        """The number of this process's own files; None where there is but one process."""
        return self.rank if self.count > 1 else None

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every `count`-th of `items`, beginning at this process's number."""
        return list(items[self.rank :: self.count])

    def forget_skipped(self, folder: str | os.PathLike[str] | None) -> None:
        """Remove what the processes of a broken run could not answer: it is tried again."""
        if self.first and folder is not None:
            for path in Path(folder).glob("skipped-*.json"):
                path.unlink()

    def join_skipped(self, folder: Path, skipped: Skipped) -> Skipped:
        """What any process could not answer; all processes call this, and all learn the same."""
        if self.count == 1:
            return skipped
        write_json(folder / f"skipped-{self.rank}.json", skipped)
        self.wait()
        found: Skipped = {}
        for rank in reversed(range(self.count)):
            for task, reasons in read_json(folder / f"skipped-{rank}.json").items():
                found.setdefault(task, {}).update(reasons)
        self.wait()
        (folder / f"skipped-{self.rank}.json").unlink()
        return found


def in_one_process(what: str) -> None:
    """ValueError under a launcher of several processes, which `what` cannot be shared among."""
    count: Any = os.environ.get("WORLD_SIZE", "1")
    if int(count) > 1:
        raise ValueError(
            f"{what} runs in one process, but the launcher started {count}; start it without accelerate "
            "launch, or with --num_processes 1"
        )
