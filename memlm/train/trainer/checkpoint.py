"""What is kept beside the Trainer's own files in a checkpoint: positions, memories, a list of all files.

curriculum.json is the same for all processes; stream-RANK.json and memory-RANK-SLOT.safetensors, the
memories of documents that later batches read on, are one process's own. memlm_checkpoint.json is written
last, when every process is done: a checkpoint is whole when all files are as it says.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from transformers.utils import CONFIG_NAME

from memlm.files import file_checksum, read_checked_json, read_json, write_checked_json
from memlm.state import MemoryState
from memlm.train.data import TrainingStream

CURRICULUM_FILE = "curriculum.json"
SEAL = "memlm_checkpoint.json"
# Written last by transformers, and by process 0 alone.
LAST = "trainer_state.json"
VERSION = 1
_log = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def seal(folder: Path) -> None:
    """List the files of a finished checkpoint with their sizes and checksums."""
    listed = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, file_checksum(path)]
        for path in listed
        if not path.name.startswith(".")
    }
    write_checked_json(folder / SEAL, {"version": VERSION, "files": files})


def check_checkpoint(folder: Path) -> None:
    """ValueError unless a checkpoint is whole: all its files are there, and as they were written.

    Older versions listed no files; of theirs, the last one has to be readable.
    """
    if not (folder / SEAL).is_file():
        position = folder / CURRICULUM_FILE
        if position.is_file() and read_checked_json(position)[1]:
            raise ValueError(f"checkpoint {str(folder)!r} has no {SEAL}: it was cut short")
        try:
            read_json(folder / LAST)
        except OSError as error:
            raise ValueError(
                f"checkpoint {str(folder)!r} has no {LAST}: it was cut short"
            ) from error
        return
    sealed, _ = read_checked_json(folder / SEAL)
    if sealed.get("version") != VERSION:
        raise ValueError(
            f"checkpoint {str(folder)!r} has version {sealed.get('version')!r}, this memlm reads "
            f"{VERSION}; use the memlm it was written with"
        )
    try:
        files = {str(n): (int(size), str(known)) for n, (size, known) in sealed["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{str(folder / SEAL)!r} is damaged ({error})") from error
    for name, (size, known) in files.items():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{str(folder / SEAL)!r} names {name!r}, outside of its folder")
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or file_checksum(path) != known:
            raise ValueError(
                f"checkpoint {str(folder)!r} is damaged ({name} is not as it was written); resume from "
                "an earlier one"
            )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in the folder of a run, whole or not, those of the latest steps first."""
    found = ((_CHECKPOINT.fullmatch(path.name), path) for path in folder.glob("checkpoint-*"))
    numbered = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def remove_old(folder: Path, limit: int | None, best: str | None) -> None:
    """Remove all but the latest `limit` checkpoints, and the best one."""
    if not limit or limit < 0:
        return
    for path in checkpoints(folder)[limit:]:
        if best is None or path.resolve() != Path(best).resolve():
            shutil.rmtree(path, ignore_errors=True)


def save_position(folder: Path, stream: TrainingStream, rank: int, *, curriculum: bool) -> None:
    """Write the position of `stream`. curriculum: whether this process writes what all processes share."""
    if curriculum:
        write_checked_json(folder / CURRICULUM_FILE, stream.curriculum.state_dict())
    write_checked_json(folder / f"stream-{rank}.json", stream.state_dict())


def load_position(folder: Path, stream: TrainingStream, rank: int) -> None:
    """Put `stream`, for which `deal` was called already, back to where it stood.

    Where more or fewer processes wrote the checkpoint, documents are dealt anew from there on.
    FileNotFoundError when another kind of trainer wrote the checkpoint; ValueError when a file is damaged.
    """
    files = sorted(folder.glob("stream-*.json"))
    for name in (CURRICULUM_FILE, "stream-0.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"checkpoint {str(folder)!r} has no {name}; resume from one that MemLMTrainer wrote"
            )
    curriculum, _ = read_checked_json(folder / CURRICULUM_FILE)
    states = {file.name: read_checked_json(file)[0] for file in files}
    try:
        stream.curriculum.load_state_dict(curriculum)
        world = states["stream-0.json"]["world"]
        if world == stream.world:
            stream.load_state_dict(states[f"stream-{rank}.json"])
            return
        stream.deal_anew([states[f"stream-{number}.json"] for number in range(world)])
        _log.warning(
            "the checkpoint is of %s processes, and there are %s: documents are dealt anew, and those that "
            "were begun are not read on",
            world,
            stream.world,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"checkpoint {str(folder)!r} has a position that cannot be read ({error!r}); resume from "
            "another"
        ) from error


def load_schedule(folder: Path, config: Any) -> None:
    """Let `config`, a `MemLMConfig`, go by what schedule="auto" had measured before the checkpoint."""
    written = folder / CONFIG_NAME
    if written.is_file():
        config.schedule_measured = read_json(written).get("schedule_measured")


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
