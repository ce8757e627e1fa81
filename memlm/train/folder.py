"""The folder of a run: what is in it, whether a run may go on there, and from which checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlm.train.recipe import Recipe

RECIPE_FILE, LOG_FILE, RESULT_FILE = "recipe.yaml", "train_log.jsonl", "train_result.json"
TOKENIZER, ADAPTER = "tokenizer", "adapter"


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. loss, accuracy: of the last log line; finished: False when interrupted."""

    output_dir: str
    finished: bool
    steps: int
    stage: int
    loss: float | None
    accuracy: float | None
    seconds: float
    cpu_seconds: float
    files: tuple[str, ...] = ()


def prepare_folder(
    recipe: Recipe, out: Path, resume: bool | Literal["auto"]
) -> tuple[TrainResult | None, str | None]:
    """The finished run in `out`, or the checkpoint to go on from. Nothing is overwritten here."""
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume={resume!r} is unknown; use True, False or 'auto'")
    there, finished, checkpoint = out / RECIPE_FILE, out / RESULT_FILE, last_checkpoint(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"output_dir={str(out)!r} is a file; name a folder")
    begun = checkpoint is not None or finished.is_file()
    if there.is_file() and begun:
        unlike = recipe.differences(Recipe.load(there))
        if unlike:
            raise ValueError(
                f"output_dir={str(out)!r} holds a run of another recipe ({'; '.join(unlike[:3])}); "
                "name another folder"
            )
    elif not there.is_file() and (out / "config.json").exists():
        raise ValueError(
            f"output_dir={str(out)!r} holds a model but no {RECIPE_FILE}; name another folder"
        )
    if resume is True and not begun:
        raise ValueError(f"output_dir={str(out)!r} holds no checkpoint; leave resume out to start")
    if resume is not False and finished.is_file():
        values = json.loads(finished.read_text(encoding="utf-8"))
        return TrainResult(**{**values, "files": tuple(values["files"])}), None
    return None, None if resume is False else checkpoint


def begin_folder(recipe: Recipe, tokenizer: Any, out: Path, fresh: bool) -> None:
    """Write the files a run has before its first checkpoint; `fresh` removes an older run."""
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in (RESULT_FILE, LOG_FILE):
            (out / name).unlink(missing_ok=True)
        for folder in (*out.glob("checkpoint-*"), out / TOKENIZER, out / ADAPTER):
            shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(out / TOKENIZER)
    recipe.save(out / RECIPE_FILE)


def last_checkpoint(out: Path) -> str | None:
    """The newest complete checkpoint: the last file of one that was cut short cannot be read."""
    found = []
    for folder in out.glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(found)[1]) if found else None
