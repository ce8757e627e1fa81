"""The arguments of MemLMTrainer: transformers' TrainingArguments, and how gradients flow.

The recipe reads the fields below from this source without importing it, so their defaults and help
are plain literals.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import cast

from transformers import TrainingArguments

from memlm.scan import Anchor
from memlm.train.trainer.initial import check_initial_state


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
    initial_state: str = field(
        default="zero",
        metadata={
            "help": "what a document's memory starts from in training: 'zero', nothing; 'pass', what "
            "another row's document left; 'carry', what the same row's last one left; 'fitted', noise like "
            "what was left. So a memory meets the states of documents far longer than those of training"
        },
    )
    initial_state_probability: float = field(
        default=1.0,
        metadata={"help": "share of documents (0 to 1) that start as initial_state says"},
    )
    track_accuracy: bool = field(
        default=False,
        metadata={"help": "log the share of answers (runs of targets) predicted right"},
    )

    memory_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "peak learning rate of the memories, which are new where the base is pretrained; null: "
            "learning_rate. Schedules and stages scale both alike"
        },
    )
    memory_weight_decay: float | None = field(
        default=None, metadata={"help": "weight decay of the memories; null: weight_decay"}
    )
    muon_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "peak learning rate of Muon, which then steps the hidden matrices, while optim steps "
            "the rest at learning_rate; null: optim steps all. Schedules and stages scale both alike"
        },
    )
    skip_nonfinite: bool = field(
        default=True,
        metadata={
            "help": "skip batches whose memory or loss overflows, and steps whose gradient does, and "
            "log their number as 'skipped'; false, or under FSDP: an overflowing memory ends the run"
        },
    )

    @property
    def steps_by(self) -> tuple[int | None, Anchor]:
        """Segments that a step takes, None for a whole piece, and from which end they are counted."""
        window = self.bptt_depth if self.window_step == "window" else None
        return window, cast(Anchor, self.bptt_anchor)

    def __post_init__(self) -> None:
        if self.bptt_depth is not None and self.bptt_depth < 1:
            raise ValueError(f"bptt_depth={self.bptt_depth} must be at least 1 segment, or None")
        if self.bptt_anchor not in ("end", "start"):
            raise ValueError(f"bptt_anchor={self.bptt_anchor!r} is unknown; use 'end' or 'start'")
        if self.window_step not in ("document", "window"):
            raise ValueError(
                f"window_step={self.window_step!r} is unknown; use 'document' or 'window'"
            )
        for name in ("memory_learning_rate", "memory_weight_decay", "muon_learning_rate"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}={value} must be 0 or more, or None")
        check_initial_state(
            self.initial_state, self.initial_state_probability, self.per_device_train_batch_size
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
        # The batches hold columns that the Trainer would otherwise remove.
        self.remove_unused_columns = False
        # Every window gives every parameter a gradient, and a memory model has no buffers that change, so
        # DDP need not look for either: both cost time, and the second breaks when processes run different
        # numbers of windows.
        for name in ("ddp_find_unused_parameters", "ddp_broadcast_buffers"):
            if getattr(self, name) is None:
                setattr(self, name, False)
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process would need DataParallel, which cannot carry "
                "memories; start with `accelerate launch`, or show one GPU"
            )
