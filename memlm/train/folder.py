"""The folder of a run: what is in it, whether a run may go on there, and from which checkpoint."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from memlm.files import read_json
from memlm.folders import replace_together
from memlm.train.recipe import Recipe
from memlm.train.trainer.checkpoint import SEAL, check_checkpoint, checkpoints

RECIPE_FILE, LOG_FILE, RESULT_FILE = "recipe.yaml", "train_log.jsonl", "train_result.json"
TOKENIZER, ADAPTER = "tokenizer", "adapter"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. finished: False when interrupted.

    loss, accuracy: of the last log line; eval_loss, eval_accuracy: of the last evaluation on held-out data.
    """

    output_dir: str
    finished: bool
    steps: int
    stage: int
    loss: float | None
    accuracy: float | None
    seconds: float
    cpu_seconds: float
    files: tuple[str, ...] = ()
    eval_loss: float | None = None
    eval_accuracy: float | None = None


def prepare_folder(
    recipe: Recipe, out: Path, resume: bool | Literal["auto"]
) -> tuple[TrainResult | None, str | None]:
    """The finished run in `out`, or the checkpoint to go on from. Nothing is overwritten here."""
    if resume not in (True, False, "auto"):
        raise ValueError(f"resume={resume!r} is unknown; use True, False or 'auto'")
    there, finished = out / RECIPE_FILE, out / RESULT_FILE
    checkpoint = None if resume is False or finished.is_file() else last_checkpoint(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"output_dir={str(out)!r} is a file; name a folder")
    # With resume=False, too, the folder of another recipe is left alone.
    begun = finished.is_file() or bool(checkpoints(out) if resume is False else checkpoint)
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
        return _read_result(finished), None
    return None, checkpoint


def _read_result(path: Path) -> TrainResult:
    try:
        values = read_json(path)
        return TrainResult(**{**values, "files": tuple(values["files"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}); remove it, and the run goes on from its last checkpoint"
        ) from error


def begin_folder(recipe: Recipe, tokenizer: Any, out: Path, fresh: bool) -> None:
    """Write the files a run has before its first checkpoint; `fresh` removes an older run."""
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in (RESULT_FILE, LOG_FILE):
            (out / name).unlink(missing_ok=True)
        for folder in (*out.glob("checkpoint-*"), out / TOKENIZER, out / ADAPTER):
            shutil.rmtree(folder, ignore_errors=True)
        with replace_together(out / TOKENIZER) as folder:
            tokenizer.save_pretrained(folder)
    recipe.save(out / RECIPE_FILE)


def last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that is whole: one that was cut short, or is damaged, is passed over.

    ValueError when there are damaged ones alone: starting over would remove them.
    """
    damaged: list[ValueError] = []
    for folder in checkpoints(out):
        try:
            check_checkpoint(folder)
        except ValueError as error:
            if (folder / SEAL).is_file():
                damaged.append(error)
                _log.warning("%s", error)
            continue
        return str(folder)
    if damaged:
        raise ValueError(f"{damaged[0]}, of which there is none; resume=False starts over")
    return None
