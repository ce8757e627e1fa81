"""The positions of data and curriculum, kept beside the Trainer's own files in a checkpoint.

curriculum.json is the same for all processes; stream-RANK.json and memory-RANK-SLOT.safetensors, the
memories of documents that later batches read on, are one process's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from memlm.files import write_json
from memlm.state import MemoryState
from memlm.train.data import TrainingStream

CURRICULUM_FILE = "curriculum.json"


def save_position(folder: Path, stream: TrainingStream, rank: int, *, curriculum: bool) -> None:
    """Write the position of `stream`. curriculum: whether this process writes what all processes share."""
    if curriculum:
        write_json(folder / CURRICULUM_FILE, stream.curriculum.state_dict())
    write_json(folder / f"stream-{rank}.json", stream.state_dict())


def load_position(folder: Path, stream: TrainingStream, rank: int) -> None:
    """Put `stream`, for which `deal` was called already, back to where it stood.

    FileNotFoundError when another kind of trainer, or fewer processes, wrote the checkpoint.
    """
    found = {}
    for name in (CURRICULUM_FILE, f"stream-{rank}.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"checkpoint {str(folder)!r} has no {name}; resume from one that MemLMTrainer "
                "wrote with as many processes"
            )
        found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
    stream.curriculum.load_state_dict(found[CURRICULUM_FILE])
    stream.load_state_dict(found[f"stream-{rank}.json"])


def load_schedule(folder: Path, config: Any) -> None:
    """Let `config`, a `MemLMConfig`, go by what schedule="auto" had measured before the checkpoint."""
    written = folder / CONFIG_NAME
    if written.is_file():
        found = json.loads(written.read_text(encoding="utf-8"))
        config.schedule_measured = found.get("schedule_measured")


def save_states(folder: Path, carried: Mapping[int, MemoryState], rank: int) -> None:
    """Write the memories that a process hands to its next batches, by slot."""
    for slot, state in carried.items():
        state.save(folder / f"memory-{rank}-{slot}.safetensors")


def load_states(folder: Path, rank: int, device: str) -> dict[int, MemoryState]:
    """What `save_states` wrote."""
    return {
        int(path.stem.rsplit("-", 1)[1]): MemoryState.load(path, device)
        for path in sorted(folder.glob(f"memory-{rank}-*.safetensors"))
    }
