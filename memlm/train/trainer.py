"""transformers' Trainer with truncated backpropagation through the segments of a document.

Only how a batch is run is different: window by window, backward after each, one optimiser step over
the document. Arguments, callbacks, trackers, checkpoints and `accelerate launch` are the Trainer's
own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count as count_up
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from memlm.files import write_json
from memlm.modeling import MemLMForCausalLM
from memlm.scan import Anchor, first_window, scan
from memlm.segment import (
    BORDERS,
    IGNORE,
    Packing,
    Segment,
    cut,
    documents_in,
    shift_labels,
)
from memlm.state import MemoryState
from memlm.train.data import Collator, TrainingStream, Windows

CURRICULUM_FILE = "curriculum.json"
logger = logging.get_logger(__name__)


@dataclass
class MemLMTrainingArguments(TrainingArguments):
    """TrainingArguments, and how gradients flow between segments."""

    bptt_depth: int | None = field(
        default=None,
        metadata={"help": "segments a gradient reaches back; null: the whole document"},
    )
    bptt_anchor: str = field(
        default="end",
        metadata={
            "help": "windows of bptt_depth segments are counted back from the last target ('end'), or "
            "on from the document's 'start'"
        },
    )
    window_step: str = field(
        default="document",
        metadata={
            "help": "an optimiser step per 'document', or per 'window' of bptt_depth segments"
        },
    )
    track_accuracy: bool = field(
        default=False,
        metadata={"help": "log the share of answers (runs of targets) predicted right"},
    )

    skip_nonfinite: bool = field(
        default=True,
        metadata={
            "help": "leave out batches whose memory or loss, and steps whose gradient, overflow, and "
            "log their number as 'skipped'; false, and under FSDP: memories that overflow end the run"
        },
    )

    def __post_init__(self) -> None:
        if self.bptt_depth is not None and self.bptt_depth < 1:
            raise ValueError(f"bptt_depth={self.bptt_depth} must be at least 1 segment, or None")
        if self.bptt_anchor not in ("end", "start"):
            raise ValueError(f"bptt_anchor={self.bptt_anchor!r} is unknown; use 'end' or 'start'")
        if self.window_step not in ("document", "window"):
            raise ValueError(
                f"window_step={self.window_step!r} is unknown; use 'document' or 'window'"
            )
        if self.window_step == "window":
            if self.bptt_depth is None:
                raise ValueError("window_step='window' needs a window; give bptt_depth")
            if self.gradient_accumulation_steps > 1:
                raise ValueError(
                    f"gradient_accumulation_steps={self.gradient_accumulation_steps} puts off the "
                    "step that window_step='window' asks for; use 1"
                )
        launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
        if self.deepspeed is not None or launched:
            raise ValueError(
                "deepspeed steps its optimiser at every backward, and a document has one per window of "
                "bptt_depth segments; use DDP or FSDP, and leave deepspeed out"
            )
        # The batches hold more than the columns of a data set the Trainer would keep.
        self.remove_unused_columns = False
        # Every window gives every parameter a gradient, and a memory model has no buffers that
        # change: both searches cost time, and the second breaks when processes run unlike numbers
        # of windows.
        for name in ("ddp_find_unused_parameters", "ddp_broadcast_buffers"):
            if getattr(self, name) is None:
                setattr(self, name, False)
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process would need DataParallel, which cannot carry "
                "memories; start with `accelerate launch`, or show one GPU"
            )


@dataclass(frozen=True)
class Questions:
    """Questions behind one segment: ids, mask, labels (Q, T), rows (Q,) of the batch."""

    ids: Tensor
    mask: Tensor
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True)
class AskedSegment(Segment):
    """A segment of a training batch, with the questions asked of the memory behind it."""

    questions: Questions | None = None

    @property
    def aimed(self) -> bool:
        """Whether anything here has a target."""
        return self.questions is not None or self.has_labels

    @property
    def has_labels(self) -> bool:
        """Whether a token of the segment itself has a target."""
        return self.labels is not None and bool((self.labels != IGNORE).any())


@dataclass(frozen=True)
class Plan:
    """How a batch is run: its segments in windows of `depth` each, but `first` in the first of them.

    learned: the windows with a target, by number. scale: factor on the loss, 0 where there is no
    target.
    """

    segments: list[AskedSegment]
    depth: int
    first: int
    learned: frozenset[int]
    scale: float

    @property
    def calls(self) -> list[tuple[int, bool, bool, bool]]:
        """The calls the model gets: by segment, its window, learned from or not, targets, questions."""
        found = []
        for index, segment in enumerate(self.segments):
            window = window_of(index, self.depth, self.first)
            asked = segment.questions is not None
            found.append((window, window in self.learned, segment.has_labels, asked))
        return found

    @property
    def last(self) -> int:
        """The last window that is learned from; -1 for none."""
        return max(self.learned, default=-1)

    @property
    def learned_rows(self) -> Tensor | int:
        """Real rows of all segments that are learned from."""
        windows = (window_of(i, self.depth, self.first) for i in range(len(self.segments)))
        return sum(
            segment.rows
            for segment, window in zip(self.segments, windows, strict=True)
            if window in self.learned
        )


@dataclass
class Report:
    """What steps asked for besides their loss, and how much of them was left out."""

    auxiliary: Tensor | float = 0.0
    skipped: int = 0
    steps: int = 0

    def add(self, other: Report) -> None:
        self.auxiliary = self.auxiliary + other.auxiliary
        self.skipped += other.skipped
        self.steps += other.steps


class BeforeStep(TrainerCallback):
    """Tells a trainer that a step's gradients are complete."""

    def __init__(self, trainer: MemLMTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_step()


@dataclass
class Tally:
    """What was learned from: answers right, answers asked, real tokens read."""

    right: int = 0
    asked: int = 0
    tokens: int = 0

    def add(self, other: Tally) -> None:
        self.right += other.right
        self.asked += other.asked
        self.tokens += other.tokens


class MemLMTrainer(Trainer):
    """Trainer for models with memories.

    train_dataset: a `TrainingStream`, whose curriculum is then followed, saved and resumed, or any
    data set of `input_ids` (and `labels`), a document a row.
    """

    args: MemLMTrainingArguments

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if args is not None and not isinstance(args, MemLMTrainingArguments):
            raise TypeError(
                f"args is a {type(args).__name__}; MemLMTrainer takes MemLMTrainingArguments"
            )
        if kwargs.get("data_collator") is None:
            tokenizer = kwargs.get("processing_class")
            pad = getattr(tokenizer, "pad_token_id", None)
            kwargs["data_collator"] = Collator(0 if pad is None else pad)
        self._unwrapped: tuple[Any, Any] = (None, None)
        super().__init__(model=model, args=args, **kwargs)
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError(
                "label_smoothing_factor and compute_loss_func are not for documents in segments, "
                "whose loss the model sums; leave them out"
            )
        stream = self.train_dataset
        if self.args.window_step == "window" and not isinstance(stream, TrainingStream):
            raise ValueError(
                f"window_step='window' reads a document on from step to step, which train_dataset="
                f"{type(stream).__name__} cannot; give a memlm.train.TrainingStream"
            )
        self._stream = stream if isinstance(stream, TrainingStream) else None
        if self._stream is not None:
            # The stream starts where it stood; skipping batches would read them again.
            self.args.ignore_data_skip = True
            windowed = isinstance(self._stream.source, Windows)
            if self.args.window_step == "window" and not windowed:
                assert self.args.bptt_depth is not None
                self._stream.source = Windows(
                    self._stream.source,
                    self.args.bptt_depth,
                    self._model.segment_length,
                    cast(Anchor, self.args.bptt_anchor),
                )
        self._carried: dict[int, MemoryState] = {}
        # Rows of segments learned from in the present step, over all its batches and processes; None
        # where it has but one of each.
        self._learned_rows: Tensor | int | None = None
        self._step_report, self._log_report = Report(), Report()
        self.skipped = 0
        self.add_callback(BeforeStep(self))
        self._step_tally, self._log_tally, self._eval_tally = Tally(), Tally(), Tally()
        self._logged_at = time.perf_counter()
        self._parameter_count: int | None = None

    @property
    def _model(self) -> MemLMForCausalLM:
        # Kept: asking several times a step costs a small model a millisecond.
        if self._unwrapped[0] is not self.model:
            self._unwrapped = self.model, self.accelerator.unwrap_model(self.model)
        return self._unwrapped[1]

    # Data.

    def get_train_dataloader(self) -> DataLoader:
        """The stream's own batches, in its own order; any other data set as the Trainer does it."""
        if self._stream is None:
            return super().get_train_dataloader()
        self._deal()
        workers = self.args.dataloader_num_workers
        self._stream.check_workers(workers)
        prefetch = self.args.dataloader_prefetch_factor or 2
        self._stream.curriculum.lookahead = -(
            -workers * prefetch // self.args.gradient_accumulation_steps
        )
        return DataLoader(
            self._stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            # Its own: a loader draws a seed when it starts, which would move a resumed run's
            # dropout.
            generator=torch.Generator(),
        )

    def _deal(self) -> None:
        assert self._stream is not None
        self._stream.deal(
            batch_size=self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            world=self.args.world_size,
        )

    def _get_num_items_in_batch(
        self, batch_samples: list[Any], device: torch.device
    ) -> Tensor | int | None:
        # Targets of questions count as well; a document counts once, however it is windowed.
        count = sum(count_targets(batch) for batch in batch_samples)
        if len(batch_samples) == 1 and self.args.world_size == 1:
            self._learned_rows = None  # The batch's own, which is found when it is run.
            return torch.tensor(count, device=device)
        rows = sum(int(self._plan(batch, train=True).learned_rows) for batch in batch_samples)
        counts = torch.tensor([[count, rows]], device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts)
        total, self._learned_rows = counts.sum(dim=0)
        return total

    # A batch.

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run forward and backward over a batch, window by window; returns its loss, detached."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        cursor = inputs.pop("cursor", None)
        if num_items_in_batch is None:
            num_items_in_batch = count_targets(inputs)
        loss, tally = self._run(model, inputs, num_items_in_batch, train=True)
        self._step_tally.add(tally)
        if self._stream is not None and cursor is not None:
            self._note(cursor)
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a batch. Logits are neither kept nor gathered, however long documents are."""
        inputs = self._prepare_inputs(inputs)
        inputs.pop("cursor", None)
        with torch.no_grad():
            loss, tally = self._run(model, inputs, max(count_targets(inputs), 1), train=False)
        self._eval_tally.add(tally)
        return loss, None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer does; with `track_accuracy`, also the share of answers right."""
        self._eval_tally = Tally()
        metrics = super().evaluate(*args, **kwargs)
        right, asked = self._summed(self._eval_tally)
        if asked and self.args.track_accuracy:
            prefix = kwargs.get("metric_key_prefix", "eval")
            metrics[f"{prefix}_accuracy"] = right / asked
            self.log({f"{prefix}_accuracy": right / asked})
            if self._stream is not None and self.is_in_train:
                self._stream.curriculum.record_score(self._stream.step, right / asked)
        return metrics

    def _plan(self, batch: dict[str, Any], *, train: bool) -> Plan:
        return plan_of(
            batch,
            batch.get("segment_length") or self._model.segment_length,
            self.args.bptt_depth,
            cast(Anchor, self.args.bptt_anchor),
            train=train,
        )

    def _run(
        self, model: nn.Module, batch: dict[str, Any], count: Tensor | int, *, train: bool
    ) -> tuple[Tensor, Tally]:
        """All windows of a batch; the loss is summed cross-entropy divided by `count`.

        What memories ask for besides is added for windows that are learned from.
        """
        plan = self._plan(batch, train=train)
        self._check_in_step(plan)
        length = batch.get("segment_length") or self._model.segment_length
        continued = batch.get("continued")
        # Documents packed into one row have rows of their own.
        rows = len(plan.segments[0].ids if plan.segments else batch["input_ids"])
        tally = Tally(tokens=sum(tokens_in(segment) for segment in plan.segments))
        state = self._start(continued, rows)
        scale = plan.scale
        # A mean over all that is learned from, and no share of all targets.
        weight = self._auxiliary_weight / self._rows_of(plan) if train else 0.0
        if train and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, but `count` is the sum over them.
            scale, weight = scale * self.args.world_size, weight * self.args.world_size
        total = torch.zeros((), device=self.args.device)
        windows, reduced = count_up(), False

        def run_window(
            window: list[Any], state: MemoryState
        ) -> tuple[tuple[Tensor | None, Tally], MemoryState]:
            nonlocal reduced
            index = next(windows)
            learn = train and index in plan.learned
            with self._context(model, learn, index == plan.last):
                loss, extra, score, state = self._window(model, window, state, count, length)
                if loss is not None:
                    loss = loss * scale
                if loss is not None and learn:
                    asked = loss if extra is None else loss + extra * weight
                    if self._may_skip and not bool(asked.isfinite()):
                        raise FloatingPointError("the loss is not finite")
                    if extra is not None:
                        self._step_report.auxiliary += extra.detach() * weight
                    self.accelerator.backward(asked)
                    reduced = index == plan.last
            return (None if loss is None else loss.detach(), score), state

        try:
            for (loss, score), behind in scan(
                run_window, plan.segments, state, plan.depth, plan.first
            ):
                if loss is not None:
                    total = total + loss
                tally.add(score)
                state = behind
        except FloatingPointError as error:
            self._skip(error)
            if not train:
                return torch.full_like(total, torch.nan), tally
            if not reduced:
                self._reduce_nothing(model, batch["input_ids"][:1, :1])
            state = self._model.init_state(rows)
        if continued is not None and train:
            self._carried[self._slot] = self._sound(state.detach())
        return total, tally

    def _check_in_step(self, plan: Plan) -> None:
        """Refuse what FSDP, which gathers weights at every call, would wait for without end."""
        if not self._sharded:
            return
        mark = torch.tensor([crc32(repr(plan.calls).encode())], device=self.args.device)
        marks = self.accelerator.gather(mark)
        if bool((marks != marks[0]).any()):
            raise ValueError(
                f"the processes' documents at step {self.state.global_step} differ in how many segments "
                "they have or behind which of them are targets and questions, and under FSDP every "
                "process must run the same calls; give all documents the same (min_segments = "
                "max_segments, one ask_every), or use DDP"
            )

    @property
    def _sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def _may_skip(self) -> bool:
        # Under FSDP the other processes would wait for this one's next call.
        return self.args.skip_nonfinite and not self._sharded

    def _rows_of(self, plan: Plan) -> Tensor | int:
        return plan.learned_rows if self._learned_rows is None else self._learned_rows

    def _skip(self, error: FloatingPointError) -> None:
        """Count a batch that is left out from here on. Raises where that would not help."""
        sound = all(bool(p.isfinite().all()) for p in self._model.parameters())
        # Weights that overflowed would spoil every batch to come.
        if not self._may_skip or not sound:
            raise error
        self._step_report.skipped += 1
        logger.warning(f"A batch of step {self.state.global_step} is left out: {error}")

    def _reduce_nothing(self, model: nn.Module, ids: Tensor) -> None:
        """Take part in the gradients' reduction with zeros: other processes wait for it."""
        if self.args.world_size > 1:
            loss = model(ids, shift_labels=ids, logits_to_keep=None, write=False).loss
            self.accelerator.backward(loss * 0.0)

    def _window(
        self,
        model: nn.Module,
        window: Sequence[AskedSegment],
        state: MemoryState,
        count: Tensor | int,
        length: int,
    ) -> tuple[Tensor | None, Tensor | None, Tally, MemoryState]:
        """The loss of one window, what its memories ask for, summed over rows, and the state behind."""
        total: Tensor | None = None
        extra: Tensor | None = None
        tally = Tally()
        # Segments shorter than the model's own end with a call each.
        whole = length == self._model.segment_length
        for run in runs_of(window, whole):
            ids, mask, labels = joined(run)
            listen = labels is not None
            with self._predictions(listen) as predicted:
                out = model(
                    input_ids=ids,
                    attention_mask=mask,
                    shift_labels=labels,
                    memory_state=state,
                    logits_to_keep=None,
                )
            state = out.memory_state
            # Without targets of its own a segment still has what its memories ask for.
            cost = out.auxiliary_loss
            if cost is not None:
                cost = cost * sum(segment.rows for segment in run)
                extra = cost if extra is None else extra + cost
            if labels is not None:
                # Means of a call, each of them: shares of the batch's targets are another matter.
                loss = out.loss if cost is None else out.loss - out.auxiliary_loss
                loss = loss * ((labels != IGNORE).sum() / count)
                total = loss if total is None else total + loss
            if labels is not None and predicted is not None:
                tally.add(answers(labels, predicted, length))
            questions = run[-1].questions
            if questions is not None:
                loss, score = self._ask(model, questions, state, count)
                total = loss if total is None else total + loss
                tally.add(score)
        return total, extra, tally, state

    def _ask(
        self, model: nn.Module, questions: Questions, state: MemoryState, count: Tensor | int
    ) -> tuple[Tensor, Tally]:
        """The loss of questions on forks of `state`, which stays as it is."""
        limit = self._model.segment_length
        if questions.ids.shape[1] > limit:
            raise ValueError(
                f"a question of {questions.ids.shape[1]} tokens does not fit into the model's "
                f"segment_length={limit}; use longer segments"
            )
        labels = shift_labels(questions.labels)
        with self._predictions(True) as predicted:
            out = model(
                input_ids=questions.ids,
                attention_mask=questions.mask,
                shift_labels=labels,
                memory_state=state.select(questions.rows),
                logits_to_keep=None,
                num_items_in_batch=count,
                write=False,
            )
        tally = Tally() if predicted is None else answers(labels, predicted, limit)
        return out.loss, tally

    def _start(self, continued: Tensor | None, rows: int) -> MemoryState:
        fresh = self._model.init_state(rows)
        if continued is None or not bool(continued.any()):
            return fresh
        return self._carried[self._slot].where(continued, fresh)

    def _sound(self, state: MemoryState) -> MemoryState:
        """`state`, but that rows with values which are no numbers start afresh."""
        if not self.args.skip_nonfinite or not state.tensors:
            return state
        # A sum is as good a witness as every value, and one pass over the state.
        rows = state.batch_size
        sums = [value.reshape(rows, -1).sum(dim=1).float() for value in state.tensors.values()]
        sound = torch.stack(sums).isfinite().all(dim=0)
        if bool(sound.all()):
            return state
        return state.where(sound, self._model.init_state(state.batch_size)).detach()

    def before_step(self) -> None:
        """Drop a gradient that is not finite, in all processes alike, and add up their reports."""
        report, self._step_report, dropped = self._step_report, Report(), False
        # A loss scaler looks for itself, lowers its scale and leaves the step out.
        if self.args.skip_nonfinite and self.accelerator.scaler is None:
            gradients = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
            dropped = not bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if self.args.world_size > 1:
            mine = torch.tensor([[float(report.auxiliary), report.skipped, dropped]])
            auxiliary, skipped, drops = self.accelerator.gather(mine.to(self.args.device)).unbind(1)
            report = Report(float(auxiliary.mean()), int(skipped.sum()))
            dropped = bool(drops.any())
        if dropped:
            logger.warning(f"Step {self.state.global_step} is left out: its gradient is not finite")
            for parameter in self.model.parameters():
                parameter.grad = None
            report.skipped += 1
        self.skipped += report.skipped
        report.steps = 1
        self._log_report.add(report)

    @property
    def _auxiliary_weight(self) -> float:
        """The weight the present stage gives to what memories ask for besides."""
        if self._stream is None:
            return 1.0
        curriculum = self._stream.curriculum
        return curriculum.stages[curriculum.index_at(self._stream.step)].auxiliary_weight

    @property
    def _slot(self) -> int:
        return 0 if self._stream is None else self._stream.batches % self._stream.accumulation

    def _context(self, model: nn.Module, learn: bool, last: bool) -> AbstractContextManager[Any]:
        if not learn:
            return torch.no_grad()
        # FSDP keeps whole gradients while it is not synchronising.
        return nullcontext() if last or self._sharded else self.accelerator.no_sync(model)

    @contextmanager
    def _predictions(self, listen: bool) -> Iterator[list[Tensor] | None]:
        """Collect the most likely token wherever the head is asked, a tensor a segment."""
        if not (listen and self.args.track_accuracy):
            yield None
            return
        found: list[Tensor] = []

        def collect(module: nn.Module, given: Any, logits: Tensor) -> None:
            found.append(logits.detach().argmax(dim=-1).flatten())

        # Removed before backward: recomputation would ask the head once more.
        handle = self._model.get_output_embeddings().register_forward_hook(collect)
        try:
            yield found
        finally:
            handle.remove()

    # The curriculum, and where the data stand.

    def _note(self, cursor: Tensor) -> None:
        """Note that a batch was trained on; behind the last of a step, follow the curriculum."""
        assert self._stream is not None
        step = self._stream.step
        self._stream.consumed(cursor)
        if self._stream.step == step:
            return
        curriculum = self._stream.curriculum
        right, asked = self._step_tally.right, self._step_tally.asked
        if any(stage.advance_at is not None for stage in curriculum.stages):
            right, asked = self._summed(self._step_tally)
        curriculum.record(step, right, asked)
        self._log_tally.add(self._step_tally)
        self._step_tally = Tally()
        if curriculum.finished(self._stream.step):
            self.control.should_training_stop = True

    def _summed(self, tally: Tally) -> tuple[int, int]:
        """Answers right and asked, over all processes, which thus decide alike."""
        if self.args.world_size == 1:
            return tally.right, tally.asked
        pair = torch.tensor([[tally.right, tally.asked]], device=self.args.device)
        right, asked = self.accelerator.gather(pair).sum(dim=0).tolist()
        return right, asked

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stages' learning rates where they have any, else the schedule of the arguments."""
        if self._stream is None or not self._stream.curriculum.sets_learning_rate:
            return super().create_scheduler(num_training_steps, optimizer)
        if getattr(self, "lr_scheduler", None) is None:
            stream, peak = self._stream, self.args.learning_rate

            optimizer = self.optimizer if optimizer is None else optimizer

            def factor(_: int) -> float:
                return stream.curriculum.learning_rate_at(stream.step, peak) / (peak or 1.0)

            if peak == 0:
                # Nothing is a share of nothing: stages with a rate of their own bring all of it.
                for group in optimizer.param_groups:
                    group["initial_lr"] = 1.0
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what memories asked for, what was left out, the stage, the answers right and the tokens
        per second to the training log.
        """
        if "loss" in logs:
            if self._stream is None:
                self._log_tally, self._step_tally = self._step_tally, Tally()
            now = time.perf_counter()
            tokens = self._log_tally.tokens * self.args.world_size
            logs["tokens_per_second"] = tokens / max(now - self._logged_at, 1e-9)
            report, self._log_report = self._log_report, Report()
            if not isinstance(report.auxiliary, float) or report.auxiliary:
                # Beside the loss, which is cross-entropy alone, as in evaluation.
                logs["auxiliary_loss"] = float(report.auxiliary) / max(report.steps, 1)
            if report.skipped:
                logs["skipped"] = report.skipped
            if self._log_tally.asked:
                logs["accuracy"] = self._log_tally.right / self._log_tally.asked
            if self._stream is not None:
                logs["stage"] = self._stream.curriculum.index_at(max(self._stream.step - 1, 0))
            self._log_tally, self._logged_at = Tally(), now
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Six a parameter and token, the parameters counted once and not every step."""
        if self._parameter_count is None:
            self._parameter_count = sum(p.numel() for p in self._model.parameters())
        return 6 * self._parameter_count * inputs["input_ids"].numel()

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # Before the Trainer's own files: a checkpoint counts as whole once trainer_state.json,
        # which is written last, can be read.
        if self._stream is not None:
            folder = Path(self._get_output_dir(trial)) / (
                f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            self._save_stream(folder)
        super()._save_checkpoint(model, trial)

    def _save_stream(self, folder: Path) -> None:
        assert self._stream is not None
        rank = self.args.process_index
        if self.is_world_process_zero():
            write_json(folder / CURRICULUM_FILE, self._stream.curriculum.state_dict())
        write_json(folder / f"stream-{rank}.json", self._stream.state_dict())
        for slot, state in self._carried.items():
            state.save(folder / f"memory-{rank}-{slot}.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._stream is None:
            return
        folder, rank = Path(resume_from_checkpoint), self.args.process_index
        found = {}
        for name in (CURRICULUM_FILE, f"stream-{rank}.json"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"checkpoint {str(folder)!r} has no {name}; resume from one that MemLMTrainer "
                    "wrote with as many processes"
                )
            found[name] = json.loads((folder / name).read_text(encoding="utf-8"))
        self._deal()
        self._stream.curriculum.load_state_dict(found[CURRICULUM_FILE])
        self._stream.load_state_dict(found[f"stream-{rank}.json"])
        self._carried = {
            int(path.stem.rsplit("-", 1)[1]): MemoryState.load(path, str(self.args.device))
            for path in sorted(folder.glob(f"memory-{rank}-*.safetensors"))
        }


def count_targets(batch: dict[str, Any]) -> int:
    """Targets of a batch, those of questions included."""
    _, _, targets = packed(batch)
    count = int((targets != IGNORE).sum())
    if "question_labels" in batch:
        count += int((batch["question_labels"][:, 1:] != IGNORE).sum())
    return count


def packed(batch: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """ids, mask and shifted targets (B, n), real tokens first; the mask None when all are real.

    Documents packed into one row (`documents_in`) get rows of their own.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels, targets = batch.get("labels"), batch.get("shift_labels")
    if labels is None and targets is None:
        raise ValueError("the batch has no labels; give labels, with -100 where there is no target")
    given = targets if targets is not None else labels
    assert given is not None
    real = None if mask is None or bool(mask.all()) else mask.to(torch.bool)
    documents = documents_in(ids, real, **{name: batch.get(name) for name in BORDERS})
    if documents is not None and "question_at" in batch:
        raise ValueError(
            "question_at counts rows of one document, but position_ids, seq_idx or cu_seq_lens_q put "
            "several into a row; give each a row of its own"
        )
    if real is not None or documents is not None:
        packing = Packing.of(torch.ones_like(ids) if real is None else real, documents)
        ids, given = packing.pack(ids, 0), packing.pack(given, IGNORE)
        real = packing.mask
    return ids, real, given if targets is not None else shift_labels(given)


def segments_of(batch: dict[str, Any], length: int) -> list[AskedSegment]:
    """A batch as segments of `length` tokens, each with the questions behind it."""
    ids, mask, targets = packed(batch)
    asked: dict[int, Questions] = {}
    if "question_at" in batch:
        rows, places = batch["question_at"].unbind(dim=1)
        for place in places.unique().tolist():
            here = places == place
            width = int(batch["question_mask"][here].sum(dim=1).max())
            asked[place] = Questions(
                batch["question_ids"][here][:, :width],
                batch["question_mask"][here][:, :width],
                batch["question_labels"][here][:, :width],
                rows[here],
            )
    count = -(-ids.shape[1] // length)
    if asked and max(asked) >= count:
        raise ValueError(
            f"a question stands behind segment {max(asked)}, but the batch has {count} segments; "
            f"give 0 to {count - 1}"
        )
    return [
        AskedSegment(segment.ids, segment.mask, segment.labels, asked.get(index))
        for index, segment in enumerate(cut(ids, mask, targets, length))
    ]


def window_of(segment: int, depth: int, first: int) -> int:
    """The window segment number `segment` is in, where the first holds `first`, the others `depth`."""
    return (segment + depth - first) // depth


def plan_of(
    batch: dict[str, Any], length: int, depth: int | None, anchor: Anchor, *, train: bool
) -> Plan:
    """Cut a batch into segments of `length` and windows of `depth` segments; None: one for all.

    Nothing behind the last target is learned from, nor remembered unless a later batch reads on, and
    from the end, windows are counted back from it. train: a batch without a target gets one that
    counts nothing, since all processes reduce gradients once a batch.
    """
    segments, scale = segments_of(batch, length), 1.0
    if train and not any(segment.aimed for segment in segments):
        segments[-1], scale = with_target(segments[-1]), 0.0
    aimed = [index for index, segment in enumerate(segments) if segment.aimed]
    end = max(aimed, default=-1) + 1
    if batch.get("continued") is None:
        segments = segments[:end]
    depth = depth or max(len(segments), 1)
    first = first_window(max(end, 1), depth, anchor)
    learned = frozenset(window_of(index, depth, first) for index in aimed)
    return Plan(segments, depth, first, learned, scale)


def local(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that may be sharded."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def runs_of(window: Sequence[AskedSegment], whole: bool) -> Iterator[list[AskedSegment]]:
    """Consecutive segments the model reads in one call: up to the next question."""
    run: list[AskedSegment] = []
    for segment in window:
        run.append(segment)
        if segment.questions is not None or not whole:
            yield run
            run = []
    if run:
        yield run


def joined(run: Sequence[AskedSegment]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """ids, mask (None when all are real), targets (None when there are none) of a run, (B, n)."""
    ids = torch.cat([segment.ids for segment in run], dim=1)
    masks = [segment.mask for segment in run if segment.mask is not None]
    mask = torch.cat(masks, dim=1) if masks else None
    if not any(segment.has_labels for segment in run):
        return ids, mask, None
    return ids, mask, torch.cat([s.labels for s in run if s.labels is not None], dim=1)


def with_target(segment: AskedSegment) -> AskedSegment:
    """`segment` with its own first token as a target, in a row that has one."""
    labels = torch.full_like(segment.ids, IGNORE)
    row = 0 if segment.mask is None else int(segment.mask[:, 0].long().argmax())
    labels[row, 0] = segment.ids[row, 0]
    return replace(segment, labels=labels)


def tokens_in(segment: Segment) -> int:
    """Real tokens of a segment."""
    return segment.ids.numel() if segment.mask is None else int(segment.mask.sum())


def answers(labels: Tensor, predicted: Sequence[Tensor], length: int) -> Tally:
    """Score runs of consecutive targets in labels (B, n): right when every token of one is.

    predicted: the most likely tokens at the targets, segment by segment, as the model computed
    them.
    """
    aimed = labels != IGNORE
    guessed = torch.full_like(labels, IGNORE)
    parts = iter(predicted)
    for at in range(0, labels.shape[1], length):
        here = aimed[:, at : at + length]
        if bool(here.any()):
            guessed[:, at : at + length][here] = next(parts)
    before = torch.cat([torch.zeros_like(aimed[:, :1]), aimed[:, :-1]], dim=1)
    run = (aimed & ~before).flatten().long().cumsum(dim=0).view_as(labels)
    wrong = run[aimed & (guessed != labels)].unique().numel()
    asked = int(run.max())
    return Tally(asked - wrong, asked)
