"""The Trainer: it differs from transformers' own only in how a batch is run.

A batch runs window by window, with a backward after each and one optimiser step over the document.
Arguments, callbacks, trackers, checkpoints and `accelerate launch` are the Trainer's own.
"""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from itertools import count as count_up
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import logging

from memlm.modeling import MemLMForCausalLM
from memlm.scan import Anchor, scan
from memlm.state import MemoryState
from memlm.train.data import Collator, TrainingStream, Windows
from memlm.train.trainer.arguments import MemLMTrainingArguments
from memlm.train.trainer.checkpoint import (
    check_checkpoint,
    load_position,
    load_schedule,
    load_states,
    remove_old,
    save_position,
    save_states,
    seal,
)
from memlm.train.trainer.initial import check_fits, initial_state
from memlm.train.trainer.muon import WithMuon, check_muon, hidden_matrices
from memlm.train.trainer.optimizer import set_memory_rates, stage_scheduler
from memlm.train.trainer.partial import TrainedAlone
from memlm.train.trainer.plan import BatchPlan, count_targets, count_tokens, plan_batch
from memlm.train.trainer.tally import StepReport, Tally
from memlm.train.trainer.window import run_window

logger = logging.get_logger(__name__)


class BeforeStep(TrainerCallback):
    """Tells the trainer that a step's gradients are complete."""

    def __init__(self, trainer: MemLMTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.before_step()


class MemLMTrainer(TrainedAlone, Trainer):
    """Trainer for models with memories.

    train_dataset: a `TrainingStream`, whose curriculum is then followed, saved and resumed, or any
    data set of `input_ids` (and `labels`), one document per row.
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
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise ValueError(
                "compute_metrics and preprocess_logits_for_metrics get no predictions: no logits of a long "
                "document are kept; use track_accuracy=True, or evaluate the trained model with memlm.eval"
            )
        stream = self.train_dataset
        if self.args.window_step == "window" and not isinstance(stream, TrainingStream):
            raise ValueError(
                f"window_step='window' reads a document on from step to step, which train_dataset="
                f"{type(stream).__name__} cannot; give a memlm.train.TrainingStream"
            )
        self._stream = stream if isinstance(stream, TrainingStream) else None
        if self._stream is not None:
            # The stream itself goes on from its position; the Trainer would skip the same batches again.
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
        check_fits(self.args.initial_state, self._model.init_state(1))
        self._memory_options: dict[str, Any] = {}
        if self._stream is not None:
            for stage in self._stream.curriculum.stages:
                # A bad option is refused now rather than when its stage begins.
                self._model.memory.with_options(stage.memory)
        self._carried: dict[int, MemoryState] = {}
        # Rows of segments learned from in the present step, over all its batches and processes; None
        # where it has but one of each.
        self._learned_rows: Tensor | int | None = None
        self._step_report, self._log_report = StepReport(), StepReport()
        self.skipped = 0
        self.add_callback(BeforeStep(self))
        self._step_tally, self._log_tally, self._eval_tally = Tally(), Tally(), Tally()
        self._logged_at = time.perf_counter()
        self._parameter_count: int | None = None

    @property
    def _model(self) -> MemLMForCausalLM:
        # Kept: asking several times per step costs a small model a millisecond.
        if self._unwrapped[0] is not self.model:
            self._unwrapped = self.model, self.accelerator.unwrap_model(self.model)
        return self._unwrapped[1]

    # Data.

    def get_train_dataloader(self) -> DataLoader:
        """The stream's own batches, in its own order; any other data set as the Trainer does it."""
        if self._stream is None:
            return super().get_train_dataloader()
        self._deal_stream()
        self._stream.last_step = self.args.max_steps if self.args.max_steps > 0 else None
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
            # Its own generator: a loader draws a seed when it starts, which would change a resumed run's
            # dropout.
            generator=torch.Generator(),
        )

    def _deal_stream(self) -> None:
        """Tell the stream which share of each batch is this process's."""
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
        # Targets of questions count as well; a document counts once, whatever its windows.
        # None is one, by which a sum of nothing is divided.
        count = sum(count_targets(batch) for batch in batch_samples)
        if len(batch_samples) == 1 and self.args.world_size == 1:
            self._learned_rows = None  # The batch's own number, found when it is run.
            return torch.tensor(max(count, 1), device=device)
        rows = sum(int(self._plan(batch, train=True).learned_rows) for batch in batch_samples)
        counts = torch.tensor([[count, rows]], device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts)
        total, self._learned_rows = counts.sum(dim=0)
        return total.clamp(min=1)

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
            num_items_in_batch = max(count_targets(inputs), 1)
        self._set_memory_options()
        loss, tally = self._run_batch(model, inputs, num_items_in_batch, train=True)
        self._step_tally.add(tally)
        if self._stream is not None and cursor is not None:
            self._follow_curriculum(cursor)
        return loss

    def try_batch(self, batch: dict[str, Any]) -> None:
        """Forward and backward over a batch, as in training, of which nothing is left. Before `train`."""
        carried = dict(self._carried)
        self.training_step(
            self.model, {k: v for k, v in batch.items() if k not in ("cursor", "continued")}
        )
        self.model.zero_grad(set_to_none=True)
        self._carried, self._step_tally, self._step_report = carried, Tally(), StepReport()

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
            loss, tally = self._run_batch(model, inputs, max(count_targets(inputs), 1), train=False)
        self._eval_tally.add(tally)
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the Trainer does; with `track_accuracy`, also the share of answers right."""
        self._eval_tally = Tally()
        output = super().evaluation_loop(*args, **kwargs)
        right, asked = self._answers_everywhere(self._eval_tally)
        if asked and self.args.track_accuracy and output.metrics is not None:
            output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_accuracy"] = right / asked
            if self._stream is not None and self.is_in_train:
                self._stream.curriculum.record_score(self._stream.step, right / asked)
        return output

    def _plan(self, batch: dict[str, Any], *, train: bool) -> BatchPlan:
        """The batch's segments and windows, as the arguments have them."""
        return plan_batch(
            batch,
            batch.get("segment_length") or self._model.segment_length,
            self.args.bptt_depth,
            cast(Anchor, self.args.bptt_anchor),
            train=train,
        )

    def _run_batch(
        self, model: nn.Module, batch: dict[str, Any], count: Tensor | int, *, train: bool
    ) -> tuple[Tensor, Tally]:
        """Run all windows of a batch, with a backward after each that is learned from.

        Returns summed cross-entropy divided by `count`, and the answers counted. The memories' auxiliary
        loss only enters the gradients.
        """
        plan = self._plan(batch, train=train)
        self._check_in_step(plan)
        length = batch.get("segment_length") or self._model.segment_length
        continued = batch.get("continued")
        # Documents packed into one row get a row each.
        rows = len(plan.segments[0].ids if plan.segments else batch["input_ids"])
        tally = Tally(tokens=sum(count_tokens(segment) for segment in plan.segments))
        state = self._state_before(continued, rows, train=train)
        scale = plan.scale
        # The auxiliary loss is a mean over all rows learned from, not a share of all targets.
        weight = self._auxiliary_weight / self._rows_learned_from(plan) if train else 0.0
        if train and self.args.average_tokens_across_devices:
            # Gradients are averaged over processes, but `count` is the sum over them.
            scale, weight = scale * self.args.world_size, weight * self.args.world_size
        total = torch.zeros((), device=self.args.device)
        head = self._model.get_output_embeddings() if self.args.track_accuracy else None
        windows, reduced = count_up(), False

        def run_and_learn(
            window: list[Any], state: MemoryState
        ) -> tuple[tuple[Tensor | None, Tally], MemoryState]:
            nonlocal reduced
            index = next(windows)
            learn = train and index in plan.learned
            with self._gradient_context(model, learn, index == plan.last_learned):
                result = run_window(
                    model,
                    window,
                    state,
                    count=count,
                    length=length,
                    model_length=self._model.segment_length,
                    head=head,
                )
                loss, auxiliary = result.loss, result.auxiliary
                if loss is not None:
                    loss = loss * scale
                if loss is not None and learn:
                    minimised = loss if auxiliary is None else loss + auxiliary * weight
                    if self._may_skip and not bool(minimised.isfinite()):
                        raise FloatingPointError("the loss is not finite")
                    if auxiliary is not None:
                        self._step_report.auxiliary += auxiliary.detach() * weight
                    self.accelerator.backward(minimised)
                    reduced = index == plan.last_learned
            return (None if loss is None else loss.detach(), result.tally), result.state

        try:
            for (loss, answered), after in scan(
                run_and_learn, plan.segments, state, plan.depth, plan.first
            ):
                if loss is not None:
                    total = total + loss
                tally.add(answered)
                state = after
        except FloatingPointError as error:
            self._leave_out(error)
            if not train:
                return torch.full_like(total, torch.nan), tally
            if not reduced:
                self._reduce_nothing(model, batch["input_ids"][:1, :1])
            state = self._model.init_state(rows)
        if train and (continued is not None or self.args.initial_state != "zero"):
            self._carried[self._slot] = self._restart_broken_rows(state.detach())
        return total, tally

    def _check_in_step(self, plan: BatchPlan) -> None:
        """Refuse a batch at which FSDP, which gathers weights at every call, would wait forever."""
        if not self._sharded:
            return
        mark = torch.tensor([crc32(repr(plan.call_pattern).encode())], device=self.args.device)
        marks = self.accelerator.gather(mark)
        if bool((marks != marks[0]).any()):
            raise ValueError(
                f"the processes' documents at step {self.state.global_step} differ in how many segments "
                "they have or in which of them have targets and questions, and under FSDP every "
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

    def _rows_learned_from(self, plan: BatchPlan) -> Tensor | int:
        """Rows of segments learned from, over all batches and processes of the step."""
        return plan.learned_rows if self._learned_rows is None else self._learned_rows

    def _leave_out(self, error: FloatingPointError) -> None:
        """Count a batch, the rest of which is left out. Raises `error` where that would not help."""
        sound = all(bool(p.isfinite().all()) for p in self._model.parameters())
        # Weights that overflowed would spoil every later batch.
        if not self._may_skip or not sound:
            raise error
        self._step_report.skipped += 1
        logger.warning(f"A batch of step {self.state.global_step} is left out: {error}")

    def _reduce_nothing(self, model: nn.Module, ids: Tensor) -> None:
        """Take part in the gradients' reduction with zeros, which other processes wait for."""
        if self.args.world_size > 1:
            loss = model(ids, shift_labels=ids, logits_to_keep=None, write=False).loss
            self.accelerator.backward(loss * 0.0)

    def _state_before(self, continued: Tensor | None, rows: int, *, train: bool) -> MemoryState:
        """The memory a batch starts with: what the last one left in rows `continued` (B,), else fresh.

        A fresh memory is empty, or what the argument `initial_state` says.
        """
        fresh, left = self._model.init_state(rows), self._carried.get(self._slot)
        if train:
            args = self.args
            seed = (args.seed, self.state.global_step, args.process_index, self._slot)
            kind, probability = args.initial_state, args.initial_state_probability
            fresh = initial_state(kind, probability, fresh, left, seed)
        if continued is None or not bool(continued.any()):
            return fresh
        assert left is not None
        return left.where(continued, fresh)

    def _restart_broken_rows(self, state: MemoryState) -> MemoryState:
        """`state` (rows B), where rows that hold infinities or NaNs are put back to the start."""
        if not self.args.skip_nonfinite or not state.tensors:
            return state
        # A sum shows infinities and NaNs as well as every value does, in one pass over the state.
        rows = state.batch_size
        sums = [value.reshape(rows, -1).sum(dim=1).float() for value in state.tensors.values()]
        sound = torch.stack(sums).isfinite().all(dim=0)
        if bool(sound.all()):
            return state
        return state.where(sound, self._model.init_state(state.batch_size)).detach()

    def before_step(self) -> None:
        """Drop a gradient that is not finite, in all processes alike, and add up the processes' reports."""
        report, self._step_report, dropped = self._step_report, StepReport(), False
        # A loss scaler checks by itself, lowers its scale and leaves the step out.
        if self.args.skip_nonfinite and self.accelerator.scaler is None:
            gradients = [local_part(p.grad) for p in self.model.parameters() if p.grad is not None]
            dropped = not bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if self.args.world_size > 1:
            mine = torch.tensor([[float(report.auxiliary), report.skipped, dropped]])
            auxiliary, skipped, drops = self.accelerator.gather(mine.to(self.args.device)).unbind(1)
            report = StepReport(float(auxiliary.mean()), int(skipped.sum()))
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
        """The weight of the memories' auxiliary loss in the present stage."""
        if self._stream is None:
            return 1.0
        curriculum = self._stream.curriculum
        return curriculum.stages[curriculum.index_at(self._stream.step)].auxiliary_weight

    @property
    def _slot(self) -> int:
        """The number of the next batch within its step: each has its own documents."""
        return 0 if self._stream is None else self._stream.batches % self._stream.accumulation

    def _gradient_context(
        self, model: nn.Module, learn: bool, last: bool
    ) -> AbstractContextManager[Any]:
        """How a window runs: without gradients, with them unreduced, or, at the `last`, reduced."""
        if not learn:
            return torch.no_grad()
        # FSDP keeps unsharded gradients while it is not synchronising.
        return nullcontext() if last or self._sharded else self.accelerator.no_sync(model)

    # The curriculum, and where the data stand.

    def _set_memory_options(self) -> None:
        """Give the memories the options that the stages have set so far, after resuming as well."""
        if self._stream is None:
            return
        options = self._stream.curriculum.memory_options_at(self._stream.step)
        if options != self._memory_options:
            self._model.set_memory_options(**options)
            self._memory_options = options

    def _follow_curriculum(self, cursor: Tensor) -> None:
        """Record that a batch was trained on; after the last of a step, follow the curriculum."""
        assert self._stream is not None
        step = self._stream.step
        self._stream.consumed(cursor)
        if self._stream.step == step:
            return
        curriculum = self._stream.curriculum
        right, asked = self._step_tally.right, self._step_tally.asked
        if any(stage.advance_at is not None for stage in curriculum.stages):
            right, asked = self._answers_everywhere(self._step_tally)
        curriculum.record(step, right, asked)
        self._log_tally.add(self._step_tally)
        self._step_tally = Tally()
        if curriculum.finished(self._stream.step):
            self.control.should_training_stop = True

    def _answers_everywhere(self, tally: Tally) -> tuple[int, int]:
        """Answers right and asked, summed over all processes, so that these decide alike."""
        if self.args.world_size == 1:
            return tally.right, tally.asked
        pair = torch.tensor([[tally.right, tally.asked]], device=self.args.device)
        right, asked = self.accelerator.gather(pair).sum(dim=0).tolist()
        return right, asked

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer does, with Muon and the memories' own learning rate and weight decay."""
        made, muon = self.optimizer is None, self.args.muon_learning_rate
        if made and muon is not None:
            check_muon(muon, self.args.memory_learning_rate, self.is_fsdp_enabled)
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and muon is not None:
            optimizer = WithMuon(optimizer, hidden_matrices(self._model), muon)
            setattr(self, "optimizer", optimizer)  # noqa: B010 (mypy would take it for a declaration)
        rates = (self.args.memory_learning_rate, self.args.memory_weight_decay)
        if made and rates != (None, None):
            set_memory_rates(optimizer, self._model.memory.parameters(), self.args)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stages' learning rates where they have any, else the schedule of the arguments."""
        if self._stream is None or not self._stream.curriculum.sets_learning_rate:
            return super().create_scheduler(num_training_steps, optimizer)
        if getattr(self, "lr_scheduler", None) is None:
            chosen = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = stage_scheduler(self._stream, chosen, self.args.learning_rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the training log: the memories' auxiliary loss, the batches and steps left out, the stage,
        the share of right answers, and tokens per second.
        """
        if "loss" in logs:
            if self._stream is None:
                self._log_tally, self._step_tally = self._step_tally, Tally()
            now = time.perf_counter()
            tokens = self._log_tally.tokens * self.args.world_size
            logs["tokens_per_second"] = tokens / max(now - self._logged_at, 1e-9)
            report, self._log_report = self._log_report, StepReport()
            if not isinstance(report.auxiliary, float) or report.auxiliary:
                # Logged apart from the loss, which is cross-entropy alone, as in evaluation.
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
        """Six per parameter and token, with the parameters counted once and not at every step."""
        if self._parameter_count is None:
            self._parameter_count = sum(p.numel() for p in self._model.parameters())
        return 6 * self._parameter_count * inputs["input_ids"].numel()

    # Checkpoints.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        folder = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            # What an earlier attempt left must not be taken for a part of this one.
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        save_states(folder, self._carried, self.args.process_index)
        if self._stream is not None:
            save_position(
                folder,
                self._stream,
                self.args.process_index,
                curriculum=self.is_world_process_zero(),
            )
        # Older checkpoints stay until this one is whole, with the files of every process.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)
            remove_old(run, limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder, rank = Path(resume_from_checkpoint), self.args.process_index
        if self.args.local_process_index == 0:
            check_checkpoint(folder)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_schedule(folder, self._model.config)
        self._carried = load_states(folder, rank, str(self.args.device))
        if self._stream is not None:
            self._deal_stream()
            load_position(folder, self._stream, rank)


def local_part(gradient: Tensor) -> Tensor:
    """This process's part of a gradient that may be sharded."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
