"""The plan of a run, before it starts: what is trained, how much is read, what it will cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from memlm.peak import PeakMemory
from memlm.train.curriculum import Curriculum, Stage
from memlm.train.data import Source, TrainingStream
from memlm.train.rows import Survey
from memlm.train.trainer import MemLMTrainer

# Batches of the trial: the first warms up, the others are timed.
WARM_UP, TIMED = 1, 2
# Numbers that an optimiser keeps per trained parameter, by the beginning of its name.
KEPT = {"adamw": 2, "adam": 2, "sgd": 0, "lion": 1, "adagrad": 1, "rmsprop": 1}


@dataclass(frozen=True)
class Trial:
    """Forward and backward over a few batches of the last stage.

    tokens, seconds: of one optimiser step, as these batches make it. peak: most bytes in use.
    """

    tokens: float
    seconds: float
    peak: int


@dataclass(frozen=True)
class Outlook:
    """The plan of a run.

    trained, frozen: numbers of parameters, by what they belong to. state_bytes: of one document's memory.
    rows_per_step: documents or pieces of an optimiser step, all processes together. optimizer_bytes: what
    the optimiser will keep; None for one that is not known here. trial: None where none was made.
    """

    trained: dict[str, int]
    frozen: int
    segment_length: int
    state_bytes: int
    steps: int
    rows_per_step: int
    bptt_depth: int | None
    stages: tuple[str, ...]
    survey: Survey | None
    pieces: int
    optimizer_bytes: int | None
    device: str
    trial: Trial | None

    @property
    def peak_bytes(self) -> int | None:
        """The estimate of the most memory in use: that of the trial, and what the optimiser keeps."""
        if self.trial is None or self.optimizer_bytes is None:
            return None
        return self.trial.peak + self.optimizer_bytes

    @property
    def seconds(self) -> float | None:
        """The estimate of the time all steps take."""
        return None if self.trial is None else self.trial.seconds * self.steps

    def lines(self) -> Iterator[str]:
        """The plan, for people."""
        parts = [f"{count:,} of the {name}" for name, count in self.trained.items() if count]
        total = sum(self.trained.values())
        yield f"trained: {total:,} parameters ({', '.join(parts)}); frozen: {self.frozen:,}"
        if self.survey is not None:
            yield from self._data(self.survey)
        depth = "the whole document" if self.bptt_depth is None else f"{self.bptt_depth} segments"
        yield (
            f"memory: {_bytes(self.state_bytes)} per document; segments of {self.segment_length} tokens, "
            f"gradients reach back {depth}"
        )
        yield from self.stages
        step = f"{self.rows_per_step} rows"
        if self.trial is not None:
            step += f", about {self.trial.tokens:,.0f} tokens"
        yield f"steps: {self.steps:,} of {step}"
        if self.trial is None or self.seconds is None:
            yield "cost: not tried out, since several processes share the run"
            return
        if self.peak_bytes is None:
            memory = f"{_bytes(self.trial.peak)}, and what the optimiser keeps"
        else:
            memory = _bytes(self.peak_bytes)
        yield (
            f"cost, from a trial on {self.device}: {_time(self.trial.seconds)} per step, "
            f"{_time(self.seconds)} in all; at most {memory} in use"
        )

    def _data(self, survey: Survey) -> Iterator[str]:
        rows, about = len(survey.lengths), "" if survey.exact else "about "
        first = "" if survey.whole else "the first "
        asked = f", {survey.questions:,} questions" if survey.questions else ""
        longest = int(survey.lengths.max())
        segments = -(-longest // self.segment_length)
        yield (
            f"data: {first}{rows:,} rows{asked}, {about}{int(survey.lengths.sum()):,} tokens; the longest "
            f"has {longest:,}, or {segments:,} segment{'s' if segments > 1 else ''}"
        )
        if survey.single and survey.whole and self.steps:
            epochs = self.steps * self.rows_per_step / self.pieces
            yield f"documents are read whole, each {epochs:.3g} times"


def look_ahead(
    trainer: MemLMTrainer, source: Source, curriculum: Curriculum, survey: Survey | None
) -> Outlook:
    """The plan of the run that `trainer` is about to do, with a trial on a few of its batches.

    Nothing of the trial is left: neither weights, nor random numbers, nor the place in the data change.
    """
    args, model = trainer.args, trainer.model
    base = {id(p) for p in model.base.parameters()}
    trained = {"memory": 0, "LoRA": 0, "base": 0}
    frozen = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            frozen += parameter.numel()
        else:
            kind = "memory" if id(parameter) not in base else "LoRA" if ".lora_" in name else "base"
            trained[kind] += parameter.numel()
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return Outlook(
        trained=trained,
        frozen=frozen,
        segment_length=model.segment_length,
        state_bytes=model.init_state(1).nbytes,
        steps=args.max_steps,
        rows_per_step=rows,
        bptt_depth=args.bptt_depth,
        stages=tuple(_stages(curriculum.stages, source)),
        survey=survey,
        pieces=0 if survey is None else survey.pieces(curriculum.stages[-1], *args.steps_by),
        optimizer_bytes=_optimizer_bytes(str(getattr(args.optim, "value", args.optim)), model),
        device=str(args.device),
        trial=try_out(trainer, source, curriculum) if args.world_size == 1 else None,
    )


def try_out(trainer: MemLMTrainer, source: Source, curriculum: Curriculum) -> Trial:
    """Run forward and backward over a few batches of the last stage."""
    args = trainer.args
    stream = TrainingStream(
        source, Curriculum([curriculum.stages[-1]]), trainer.data_collator.pad_token_id
    )
    stream.deal(batch_size=args.train_batch_size, accumulation=1, rank=0, world=1)
    batches = list(islice(stream, WARM_UP + TIMED))
    if args.gradient_checkpointing:
        # As the Trainer will; transformers 5 has changed the name.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        name = next(name for name in names if hasattr(trainer.model, name))
        getattr(trainer.model, name)(args.gradient_checkpointing_kwargs)
    seconds = []
    devices = [args.device] if args.device.type == "cuda" else []
    with torch.random.fork_rng(devices), PeakMemory(args.device) as memory:
        for batch in batches:
            began = time.perf_counter()
            with trainer.accelerator.autocast():
                trainer.try_batch(batch)
            if args.device.type == "cuda":
                torch.cuda.synchronize(args.device)
            seconds.append(time.perf_counter() - began)
    timed = batches[WARM_UP:]
    accumulation = args.gradient_accumulation_steps
    return Trial(
        tokens=sum(int(batch["attention_mask"].sum()) for batch in timed) / TIMED * accumulation,
        seconds=sum(seconds[WARM_UP:]) / TIMED * accumulation,
        peak=memory.bytes,
    )


def _stages(stages: tuple[Stage, ...], source: Source) -> Iterator[str]:
    if source.single_piece(stages) and getattr(source, "asks", False):
        return
    for number, stage in enumerate(stages, start=1):
        span = (
            f"{stage.max_segments}"
            if stage.min_segments == stage.max_segments
            else f"{stage.min_segments} to {stage.max_segments}"
        )
        ends = [] if stage.steps is None else [f"after {stage.steps:,} steps"]
        if stage.advance_at is not None:
            ends.append(f"when {stage.advance_at:.0%} of the answers are right")
        until = f", until {' or '.join(ends)}" if ends else ""
        yield f"stage {number}: {span} segments at a time{until.replace('until after', 'for')}"


def _optimizer_bytes(name: str, model: Any) -> int | None:
    if "8bit" in name or "4bit" in name or "paged" in name:
        return None
    kept = next((count for known, count in KEPT.items() if name.startswith(known)), None)
    if kept is None:
        return None
    return kept * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _time(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
