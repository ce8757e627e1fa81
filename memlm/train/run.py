"""A recipe from start to finish: tokenizer, model, data, curriculum, training, the finished model.

Running it again continues from the last whole checkpoint; a finished run is not run twice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.utils import logging

from memlm.files import write_atomically, write_json
from memlm.memory import resolve_memories
from memlm.modeling import MemLMForCausalLM
from memlm.tasks.haystack import Haystack
from memlm.tasks.haystack.cache import tokenized_haystack
from memlm.train.babilong import BabilongSource
from memlm.train.curriculum import Curriculum
from memlm.train.data import Piece, Source, TrainingStream
from memlm.train.documents import DocumentSource, open_texts
from memlm.train.recipe import ModelSection, Recipe
from memlm.train.recipe.binding import did_you_mean, plain
from memlm.train.tokenizer import babi_words, train_tokenizer
from memlm.train.trainer import MemLMTrainer, MemLMTrainingArguments

RECIPE_FILE, LOG_FILE, RESULT_FILE = "recipe.yaml", "train_log.jsonl", "train_result.json"
TOKENIZER = "tokenizer"
# What a recipe need not say.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "per_device_train_batch_size": 8,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


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
    # A run that was begun goes on, whatever older versions let pass.
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
    # Their lines and ours would write over each other.
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if progress and trainer.is_world_process_zero():
        trainer.add_callback(ProgressLine(len(curriculum.stages)))
    if trainer.is_world_process_zero():
        # Not earlier: what was refused so far must not stand in the way of the next attempt.
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


def prepare_folder(
    recipe: Recipe, out: Path, resume: bool | Literal["auto"]
) -> tuple[TrainResult | None, str | None]:
    """The finished run in `out`, or the checkpoint to go on from; nothing is overwritten before."""
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
    """Write what a run leaves before its first checkpoint; `fresh` takes an older run away."""
    out.mkdir(parents=True, exist_ok=True)
    if fresh:
        for name in (RESULT_FILE, LOG_FILE):
            (out / name).unlink(missing_ok=True)
        for folder in (*out.glob("checkpoint-*"), out / TOKENIZER):
            shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save_pretrained(out / TOKENIZER)
    recipe.save(out / RECIPE_FILE)


def last_checkpoint(out: Path) -> str | None:
    """The newest whole checkpoint: one that was cut short has no readable last file."""
    found = []
    for folder in out.glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(found)[1]) if found else None


def make_tokenizer(recipe: Recipe, saved: Path | None = None) -> Any:
    """The recipe's tokenizer, with an end token and a token to pad with; `saved`: made before."""
    section = recipe.tokenizer
    if saved is not None and (saved / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(saved)
    elif section.source == "train":
        # Every process its own: the same texts give the same tokenizer.
        whole = babi_words(recipe.data.tasks) if recipe.data.source == "babilong" else ()
        tokenizer = train_tokenizer(training_texts(recipe), section.vocab_size, whole)
    else:
        name = section.source or recipe.model.base or recipe.model.init_from
        assert name is not None
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer.source={section.source!r} has no end token; use one with an eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def training_texts(recipe: Recipe) -> Iterator[str]:
    """What a tokenizer is trained on: sentences as they stand in a haystack, or documents."""
    if recipe.data.source == "documents":
        for _, text in open_texts(recipe.data.path or ""):
            yield text
        return
    for document in Haystack.open(recipe.data.haystack, split="train").documents:
        for sentence in document.sentences:
            yield f" {sentence}"


def check_model(recipe: Recipe) -> None:
    """Refuse a model that cannot be made, before data are read for it."""
    resolve_memories(recipe.model.memory)
    if recipe.model.config is not None:
        base_config(recipe, {})


def make_model(recipe: Recipe, tokenizer: Any) -> MemLMForCausalLM:
    """The recipe's model: from scratch, from a base with fresh memory, or a trained one."""
    section = recipe.model
    if section.init_from is not None:
        model = AutoModelForCausalLM.from_pretrained(section.init_from, dtype=torch.float32)
        if not isinstance(model, MemLMForCausalLM):
            raise ValueError(
                f"model.init_from={section.init_from!r} is a {type(model).__name__} without "
                "memory; give it as model.base"
            )
        check_same_model(section, model)
    elif section.base is not None:
        model = MemLMForCausalLM.from_base(
            section.base,
            memory=section.memory,
            segment_length=section.segment_length,
            dtype=torch.float32,
        )
    else:
        model = MemLMForCausalLM.from_base(
            base_config(
                recipe,
                {
                    "vocab_size": len(tokenizer),
                    "bos_token_id": tokenizer.bos_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                    "pad_token_id": tokenizer.pad_token_id,
                },
            ),
            memory=section.memory,
            segment_length=section.segment_length,
        )
    if recipe.data.source == "babilong":
        # How the model is asked later is how it learns to be asked.
        model.config.question_template = recipe.data.question_template
        model.config.question_segment, model.config.recall_template = recipe.asking()
    reinitialise(model, section.init_std)
    rows = len(model.get_input_embeddings().state_dict()["weight"])
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model {rows}; use the base "
            "model's own tokenizer"
        )
    if section.freeze_base:
        model.freeze_base()
    return model


def check_same_model(section: ModelSection, model: MemLMForCausalLM) -> None:
    """Refuse what a recipe says of a model that is there already and says otherwise."""
    default = ModelSection()
    length = model.segment_length
    if section.segment_length not in (default.segment_length, length):
        raise ValueError(
            f"model.segment_length={section.segment_length}, but the model of init_from="
            f"{section.init_from!r} has {length}; leave it out"
        )
    if section.memory == default.memory:
        return
    entries = section.memory if isinstance(section.memory, list) else [section.memory]
    given = [entry if isinstance(entry, dict) else {"name": entry} for entry in entries]
    given = [entry for entry in given if entry["name"] not in (None, "none")]
    own = [{**entry} for entry in model.config.memory or ()]
    if len(given) != len(own) or any(
        plain(has.get(key)) != plain(value)
        for entry, has in zip(given, own, strict=True)
        for key, value in entry.items()
    ):
        raise ValueError(
            f"model.memory={section.memory!r}, but the model of init_from={section.init_from!r} has "
            f"{[entry['name'] for entry in own]} with settings of its own; leave it out"
        )


def reinitialise(model: MemLMForCausalLM, stds: dict[str, float]) -> None:
    """Draw the weights anew whose names match a pattern. ValueError when none does."""
    for pattern, std in stds.items():
        found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ValueError(f"model.init_std.{pattern} matches no weight; check the pattern")
        for parameter in found:
            torch.nn.init.normal_(parameter, std=std)


def base_config(recipe: Recipe, vocabulary: dict[str, Any]) -> Any:
    """The configuration of a base from scratch; the recipe's fields go before `vocabulary`'s."""
    values = dict(recipe.model.config or {})
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), list(CONFIG_MAPPING.keys()))
        raise ValueError(f"model.config.model_type={model_type!r} is unknown; {hint}")
    cls = CONFIG_MAPPING[model_type]
    # transformers keeps unknown fields without a word.
    known = {*cls().to_dict(), *cls.attribute_map}
    for key in values:
        if key not in known:
            raise ValueError(
                f"model.config.{key} is no field of {cls.__name__}; {did_you_mean(key, list(known))}"
            )
    return cls(**{**vocabulary, **values})


def make_source(
    recipe: Recipe, tokenizer: Any, segment_length: int, haystack: Any, seed: int | None = None
) -> Source:
    """The recipe's documents."""
    seed = recipe.seed if seed is None else seed
    if recipe.data.source == "documents":
        return DocumentSource(
            open_texts(recipe.data.path or "", recipe.data.skip_empty),
            tokenizer,
            segment_length,
            seed=seed,
            skip_empty=recipe.data.skip_empty,
            split_special_tokens=recipe.data.split_special_tokens,
        )
    return BabilongSource(haystack, segment_length, recipe.options(), seed=seed)


def make_eval_set(
    recipe: Recipe, tokenizer: Any, segment_length: int, arguments: MemLMTrainingArguments
) -> list[Piece] | None:
    """Documents of the last stage from text held out, when the arguments ask for evaluations."""
    if str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) == "no":
        return None
    if recipe.data.source == "documents":
        raise ValueError(
            "training.eval_strategy evaluates on held-out BABILong, which data.source='documents' "
            "has none of; leave it out"
        )
    haystack = tokenized_haystack(recipe.data.haystack, "eval", tokenizer)
    source = make_source(recipe, tokenizer, segment_length, haystack, seed=recipe.seed + 1)
    stage = recipe.curriculum.stages[-1]
    return [next(iter(source.document(n, stage))) for n in range(recipe.eval.samples)]


def make_arguments(recipe: Recipe, out: Path, curriculum: Curriculum) -> MemLMTrainingArguments:
    """The Trainer's arguments. ValueError when nothing says when to stop."""
    values = {**DEFAULTS, "track_accuracy": recipe.data.source == "babilong", **recipe.training}
    if "max_steps" not in values:
        if curriculum.total_steps is None:
            raise ValueError(
                "neither training.max_steps nor the steps of all stages are given; give one, so "
                "that training ends"
            )
        values["max_steps"] = curriculum.total_steps
    return MemLMTrainingArguments(output_dir=str(out), seed=recipe.seed, **values)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file it writes."""
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


class LogFile(TrainerCallback):
    """Append every log line to a JSON-lines file; a resumed run removes those that it trains again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the last step have its line."""
        if control.should_training_stop or state.global_step >= state.max_steps:
            control.should_log = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove lines after the step that training begins at."""
        if not state.is_world_process_zero or not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                keep = json.loads(line)["step"] <= state.global_step
            except (ValueError, KeyError):
                continue  # The line a kill cut short.
            if keep:
                kept.append(line + "\n")
        write_atomically(self.path, lambda file: file.write_text("".join(kept), encoding="utf-8"))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, **logs, "time": round(time.time(), 2)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


class ProgressLine(TrainerCallback):
    """One line: steps with an estimate, the stage, loss and the share of answers right."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.bar is None or not logs or "loss" not in logs:
            return
        shown = {"loss": f"{logs['loss']:.3f}"}
        if "stage" in logs:
            shown = {"stage": f"{int(logs['stage']) + 1}/{self.stages}", **shown}
        if "accuracy" in logs:
            shown["right"] = f"{logs['accuracy']:.0%}"
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


class Interrupt(TrainerCallback):
    """End at the next step with a checkpoint on Ctrl-C or SIGTERM; asked twice, end at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the two signals over while inside."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        kinds = (signal.SIGINT, signal.SIGTERM)
        before = {kind: signal.getsignal(kind) for kind in kinds}

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        for kind in kinds:
            signal.signal(kind, ask)
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
