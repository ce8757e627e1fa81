"""A recipe from start to finish: tokenizer, model, data, curriculum, training, the finished model.

Running it again continues from the last whole checkpoint; a finished run is not run twice.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import DistributedType
from transformers import PrinterCallback, ProgressCallback, set_seed
from transformers.utils import logging

from memlm.config import MemLMConfig
from memlm.data.opening import open_rows
from memlm.files import write_json
from memlm.folders import replace_together
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.train.bases import add_lora
from memlm.train.callbacks import Interrupt, LogFile, ProgressLine
from memlm.train.curriculum import Curriculum
from memlm.train.data import Source, TrainingStream
from memlm.train.folder import (
    ADAPTER,
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
    make_rows,
    make_source,
    make_tokenizer,
)
from memlm.train.outlook import Outlook, look_ahead
from memlm.train.recipe import Recipe
from memlm.train.rows import Survey
from memlm.train.trainer import MemLMTrainer


@dataclass(frozen=True)
class Run:
    """A run that is ready to start. lora: peft's wrapper of the base, where it has LoRA in it."""

    recipe: Recipe
    out: Path
    trainer: MemLMTrainer
    tokenizer: Any
    source: Source
    curriculum: Curriculum
    survey: Survey | None
    interrupt: Interrupt
    lora: Any


def train(
    recipe: Recipe | str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool | Literal["auto"] = "auto",
    progress: bool = True,
    overrides: Sequence[str] = (),
    on_outlook: Callable[[Outlook], None] | None = None,
) -> TrainResult:
    """Train what `recipe` says; model, tokenizer, log and recipe are in `output_dir` afterwards.

    With LoRA in the base, the model is saved with LoRA merged into its weights, and LoRA and memory by
    themselves in `output_dir`/adapter; with a quantised base, only the latter. resume: "auto" continues a
    run that was stopped, True insists on one, False starts over. Ctrl-C and SIGTERM end it at the next
    step with a checkpoint. on_outlook: is given the plan of the run before it starts. ValueError when
    `output_dir` holds another recipe's run.
    """
    recipe, out = _named(recipe, output_dir, overrides)
    done, checkpoint = prepare_folder(recipe, out, resume)
    if done is not None:
        return done
    began, cpu = time.perf_counter(), time.process_time()
    run = prepare(recipe, out, checkpoint)
    trainer, interrupt = run.trainer, run.interrupt
    if on_outlook is not None and trainer.is_world_process_zero():
        on_outlook(look_ahead(trainer, run.source, run.curriculum, run.survey))
    if progress and trainer.is_world_process_zero():
        trainer.add_callback(ProgressLine(len(run.curriculum.stages)))
    if trainer.is_world_process_zero():
        # Not earlier: a run refused up to here must not leave files in the way of the next attempt.
        begin_folder(recipe, run.tokenizer, out, fresh=checkpoint is None)
    trainer.accelerator.wait_for_everyone()
    with interrupt.listening(), quiet():
        trainer.train(resume_from_checkpoint=checkpoint)
    finished = not interrupt.asked
    written: list[Path] = []
    if finished:
        with quiet():
            written = save_finished(run)
    last = last_logged(trainer.state.log_history, "loss")
    evaluated = last_logged(trainer.state.log_history, "eval_loss")
    result = TrainResult(
        output_dir=str(out),
        finished=finished,
        steps=trainer.state.global_step,
        stage=run.curriculum.index_at(max(trainer.state.global_step - 1, 0)),
        loss=last.get("loss"),
        accuracy=last.get("accuracy"),
        eval_loss=evaluated.get("eval_loss"),
        eval_accuracy=evaluated.get("eval_accuracy"),
        seconds=time.perf_counter() - began,
        cpu_seconds=time.process_time() - cpu,
        files=tuple(
            str(path) for path in (*written, out / RECIPE_FILE, out / LOG_FILE) if path.is_file()
        ),
    )
    if finished and trainer.is_world_process_zero():
        write_json(out / RESULT_FILE, asdict(result))
    trainer.accelerator.wait_for_everyone()
    return result


def plan(
    recipe: Recipe | str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> Outlook:
    """What `train` would do, with a trial on a few batches. Nothing is written."""
    recipe, out = _named(recipe, output_dir, overrides)
    prepare_folder(recipe, out, resume="auto")
    # transformers' Trainer makes its folder at once.
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(recipe, Path(folder), None)
        return look_ahead(run.trainer, run.source, run.curriculum, run.survey)


def _named(
    recipe: Recipe | str | os.PathLike[str],
    output_dir: str | os.PathLike[str] | None,
    overrides: Sequence[str],
) -> tuple[Recipe, Path]:
    """The recipe, read and changed, and the folder of its run."""
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe, overrides)
    elif overrides:
        raise ValueError("overrides are for a recipe's path; this recipe is read already")
    out = Path(output_dir or recipe.output_dir or "")
    if out == Path(""):
        raise ValueError("output_dir is missing; give one, or set it in the recipe")
    return recipe, out


def prepare(recipe: Recipe, out: Path, checkpoint: str | None) -> Run:
    """Make everything that the run needs, and refuse what cannot work. Nothing is written."""
    # A run that was begun may go on even with keys that older versions let pass.
    if checkpoint is None and (unread := recipe.unread()):
        raise ValueError(
            f"the recipe sets what nothing reads ({'; '.join(unread[:3])}); leave it out"
        )
    check_model(recipe)
    curriculum = Curriculum(
        recipe.curriculum.stages,
        advance_on=recipe.curriculum.advance_on,
        score_window=recipe.curriculum.score_window,
    )
    rows = None
    if recipe.data.source == "rows":
        rows = open_rows(recipe.data.path or "", recipe.data.split)
    else:
        arguments = make_arguments(recipe, out, curriculum)
    tokenizer = make_tokenizer(recipe, None if checkpoint is None else out / TOKENIZER)
    set_seed(recipe.seed)
    model = make_model(recipe, tokenizer)
    lora = None if recipe.model.lora is None else add_lora(model, recipe.model.lora)
    source: Source
    survey = None
    if rows is not None:
        source = own = make_rows(recipe, rows, tokenizer, model)
        survey = own.survey()
        arguments = make_arguments(recipe, out, curriculum, survey)
    else:
        haystack = None
        if recipe.data.source == "babilong":
            haystack = tokenized_haystack(recipe.data.haystack, "train", tokenizer)
        source = make_source(recipe, tokenizer, model.segment_length, haystack)
    interrupt = Interrupt()
    trainer = MemLMTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingStream(source, curriculum, tokenizer.pad_token_id),
        eval_dataset=make_eval_set(recipe, source, tokenizer, model),
        processing_class=tokenizer,
        callbacks=[LogFile(out / LOG_FILE), interrupt],
    )
    if trainer.accelerator.distributed_type == DistributedType.FSDP:
        check_sharded(recipe)
    # Their progress lines and ours would overwrite each other.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return Run(recipe, out, trainer, tokenizer, source, curriculum, survey, interrupt, lora)


def check_sharded(recipe: Recipe) -> None:
    """Refuse what cannot be done with weights that are spread over processes. ValueError."""
    for name in ("lora", "quantization"):
        if getattr(recipe.model, name) is not None:
            raise ValueError(
                f"model.{name} is set, and FSDP spreads the weights over the processes, from which an "
                "adapter alone cannot be saved; train it with DDP, or the whole model"
            )
    if recipe.evaluates and recipe.data.source != "babilong":
        raise ValueError(
            "training.eval_strategy reads whole documents, and those of different lengths make different "
            "calls in each process, for which FSDP would wait forever; leave it out, or use DDP"
        )


def save_finished(run: Run) -> list[Path]:
    """Write the finished model and its tokenizer; returns the files of weights. All processes call it."""
    if run.trainer.accelerator.distributed_type == DistributedType.FSDP:
        # The Trainer gathers what each process has a part of.
        run.trainer.save_model(str(run.out))
        return [run.out / "model.safetensors"]
    if not run.trainer.is_world_process_zero():
        return []
    out, model = run.out, run.trainer.accelerator.unwrap_model(run.trainer.model)
    with replace_together(out) as folder:
        run.tokenizer.save_pretrained(folder)
    # What the order was in training says nothing of how the model is best run.
    model.config.schedule = MemLMConfig().schedule
    written = []
    if run.lora is not None or run.recipe.model.quantization is not None:
        model.save_adapter(out / ADAPTER)
        written += sorted((out / ADAPTER).glob("*.safetensors"))
    if run.recipe.model.quantization is None:
        if run.lora is not None:
            run.lora.merge_and_unload()
        model.save_pretrained(out)
        written = [out / "model.safetensors", *written]
    return written


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


def last_logged(history: list[dict[str, float]], key: str) -> dict[str, float]:
    """The newest log line that has `key`."""
    return next((line for line in reversed(history) if key in line), {})
