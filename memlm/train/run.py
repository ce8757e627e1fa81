"""A recipe from start to finish: tokenizer, model, data, curriculum, training, the finished model.

Running it again continues from the last whole checkpoint; a finished run is not run twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.utils import logging

from memlm.files import write_json
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.train.callbacks import Interrupt, LogFile, ProgressLine
from memlm.train.curriculum import Curriculum
from memlm.train.data import TrainingStream
from memlm.train.folder import (
    LOG_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    TOKENIZER,
    TrainResult,
    begin_folder,
    prepare_folder,
)
from memlm.train.making import (
    check_model,
    make_arguments,
    make_eval_set,
    make_model,
    make_source,
    make_tokenizer,
)
from memlm.train.recipe import Recipe
from memlm.train.trainer import MemLMTrainer


def train(
    recipe: Recipe | str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool | Literal["auto"] = "auto",
    progress: bool = True,
    overrides: Sequence[str] = (),
) -> TrainResult:
    """Train what `recipe` says; model, tokenizer, log and recipe are in `output_dir` afterwards.

    resume: "auto" continues a run that was stopped, True insists on one, False starts over. Ctrl-C
    and SIGTERM end it at the next step with a checkpoint. ValueError when `output_dir` holds
    another recipe's run.
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, overrides)
    elif overrides:
        raise ValueError("overrides are for a recipe's path; this recipe is read already")
    out = Path(output_dir or recipe.output_dir or "")
    if out == Path(""):
        raise ValueError("output_dir is missing; give one, or set it in the recipe")
    done, checkpoint = prepare_folder(recipe, out, resume)
    if done is not None:
        return done
    # A run that was begun may go on even with keys that older versions let pass.
    if checkpoint is None and (unread := recipe.unread()):
        raise ValueError(
            f"the recipe sets what nothing reads ({'; '.join(unread[:3])}); leave it out"
        )
    began, cpu = time.perf_counter(), time.process_time()
    check_model(recipe)
    curriculum = Curriculum(
        recipe.curriculum.stages,
        advance_on=recipe.curriculum.advance_on,
        score_window=recipe.curriculum.score_window,
    )
    arguments = make_arguments(recipe, out, curriculum)
    tokenizer = make_tokenizer(recipe, None if checkpoint is None else out / TOKENIZER)
    set_seed(recipe.seed)
    model = make_model(recipe, tokenizer)
    haystack = None
    if recipe.data.source == "babilong":
        haystack = tokenized_haystack(recipe.data.haystack, "train", tokenizer)
    source = make_source(recipe, tokenizer, model.segment_length, haystack)
    interrupt = Interrupt()
    trainer = MemLMTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingStream(source, curriculum, tokenizer.pad_token_id),
        eval_dataset=make_eval_set(recipe, tokenizer, model.segment_length, arguments),
        processing_class=tokenizer,
        callbacks=[LogFile(out / LOG_FILE), interrupt],
    )
    # Their progress lines and ours would overwrite each other.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress and trainer.is_world_process_zero():
        trainer.add_callback(ProgressLine(len(curriculum.stages)))
    if trainer.is_world_process_zero():
        # Not earlier: a run refused up to here must not leave files in the way of the next attempt.
        begin_folder(recipe, tokenizer, out, fresh=checkpoint is None)
    trainer.accelerator.wait_for_everyone()
    with interrupt.listening(), quiet():
        trainer.train(resume_from_checkpoint=checkpoint)
    finished = not interrupt.asked
    if finished and trainer.is_world_process_zero():
        with quiet():
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    last = last_logged(trainer.state.log_history)
    written = [out / name for name in ("model.safetensors", RECIPE_FILE, LOG_FILE)]
    result = TrainResult(
        output_dir=str(out),
        finished=finished,
        steps=trainer.state.global_step,
        stage=curriculum.index_at(max(trainer.state.global_step - 1, 0)),
        loss=last.get("loss"),
        accuracy=last.get("accuracy"),
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu,
        files=tuple(str(path) for path in written if path.is_file()),
    )
    if finished and trainer.is_world_process_zero():
        write_json(out / RESULT_FILE, asdict(result))
    trainer.accelerator.wait_for_everyone()
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for every file it writes."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def last_logged(history: list[dict[str, float]]) -> dict[str, float]:
    """The newest log line that has a loss."""
    return next((line for line in reversed(history) if "loss" in line), {})
