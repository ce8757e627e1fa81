"""The curriculum: how many segments a document has, and when it gets longer.

Which stage a sample belongs to depends on the optimiser step that will train on it, never on when
it was made: a stage's first step lies after everything data workers may have prepared already, so
that a run that was killed and resumed sees the documents an unbroken run sees.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

NEVER = 2**62


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a curriculum; it ends at `advance_at` or after `steps`, whichever is first."""

    max_segments: int = field(metadata={"help": "most segments a document has in this stage"})
    min_segments: int = field(
        default=1, metadata={"help": "fewest segments; the number is drawn uniformly per document"}
    )
    steps: int | None = field(
        default=None,
        metadata={"help": "optimiser steps after which the stage ends; null: no limit"},
    )
    advance_at: float | None = field(
        default=None,
        metadata={"help": "share of answers right (0 to 1) at which the stage ends; null: never"},
    )
    min_steps: int = field(
        default=0, metadata={"help": "steps before `advance_at` may end the stage"}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "peak learning rate of this stage; null: training.learning_rate"},
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "steps of this stage over which its learning rate rises"}
    )
    final_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "learning rate at the end of `steps`, reached by a cosine; null: constant"
        },
    )
    auxiliary_weight: float = field(
        default=1.0,
        metadata={
            "help": "factor on the auxiliary losses: of memories, such as armt's write_cost, and of the "
            "routers of a base with experts"
        },
    )
    memory: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "options of the memories that change with this stage and stay so, such as "
            "{train_threshold: 0.1, write_threshold: 0.1}; the model is saved with them"
        },
    )
    data: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "fields of the data section that are different in this stage"},
    )

    def __post_init__(self) -> None:
        if not 1 <= self.min_segments <= self.max_segments:
            raise ValueError(
                f"min_segments={self.min_segments} and max_segments={self.max_segments} leave no "
                "number of segments to draw; use 1 <= min_segments <= max_segments"
            )
        if self.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight={self.auxiliary_weight} must be 0 or more")
        for name in ("learning_rate", "final_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and rate < 0:
                raise ValueError(f"{name}={rate} would raise the loss; give 0 or more")
        for name in ("steps", "min_steps", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and value < (1 if name == "steps" else 0):
                raise ValueError(f"{name}={value} is not a number of steps; give a positive number")
        if self.advance_at is not None and not 0 < self.advance_at <= 1:
            raise ValueError(
                f"advance_at={self.advance_at} is not a share of answers; give a number above 0, at "
                "most 1"
            )
        if self.final_learning_rate is not None and self.steps is None:
            raise ValueError("final_learning_rate needs to know when the stage ends; give steps")

    def learning_rate_at(self, step: int, peak: float) -> float:
        """The learning rate at `step` steps into the stage."""
        peak = peak if self.learning_rate is None else self.learning_rate
        if step < self.warmup_steps:
            return peak * (step + 1) / self.warmup_steps
        if self.final_learning_rate is None:
            return peak
        assert self.steps is not None
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        low = self.final_learning_rate
        return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Curriculum:
    """Stages, and the optimiser step each began at.

    lookahead: steps whose data may exist already when it is decided that a stage ends (data workers
    prefetch); the next stage begins after them. advance_on: whether the answers of training, over the
    last `score_window` steps, or those of an evaluation are compared with a stage's `advance_at`.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        advance_on: Literal["training", "evaluation"] = "training",
        score_window: int = 50,
        lookahead: int = 0,
    ) -> None:
        import torch

        if not stages:
            raise ValueError("stages is empty; give a curriculum at least one stage")
        if score_window < 1:
            raise ValueError(f"score_window={score_window} must be at least 1 step")
        if advance_on not in ("training", "evaluation"):
            raise ValueError(
                f"advance_on={advance_on!r} is unknown; use 'training' or 'evaluation'"
            )
        self.stages = tuple(stages)
        self.advance_on = advance_on
        self.lookahead = lookahead
        self.score_window = score_window
        # Shared memory: data workers look here which stage a step belongs to.
        self._starts = torch.full((len(self.stages) + 1,), NEVER, dtype=torch.int64).share_memory_()
        self._starts[0] = 0
        self._scores: deque[tuple[int, int]] = deque(maxlen=score_window)
        self._settle(0)

    @property
    def total_steps(self) -> int | None:
        """Steps of all stages at most; None when a stage has no limit."""
        steps = [stage.steps for stage in self.stages]
        known = [count for count in steps if count is not None]
        return sum(known) if len(known) == len(steps) else None

    @property
    def sets_learning_rate(self) -> bool:
        """Whether the stages set the learning rate, instead of the trainer's schedule."""
        return any(
            stage.learning_rate is not None
            or stage.warmup_steps
            or stage.final_learning_rate is not None
            for stage in self.stages
        )

    def index_at(self, step: int) -> int:
        """The stage that trains at optimiser step `step`, counted from 0."""
        index = 0
        while index + 1 < len(self.stages) and int(self._starts[index + 1]) <= step:
            index += 1
        return index

    def start_of(self, index: int) -> int:
        """The first step of a stage that has begun."""
        return int(self._starts[index])

    def finished(self, steps_done: int) -> bool:
        """Whether the last stage has ended."""
        return int(self._starts[-1]) <= steps_done

    def accuracy(self) -> float | None:
        """Share of answers right in the last `score_window` steps of the stage; None before any."""
        asked = sum(total for _, total in self._scores)
        return sum(right for right, _ in self._scores) / asked if asked else None

    def record(self, step: int, right: int, asked: int) -> None:
        """Record the answers of step `step`, and decide whether its stage ends with it."""
        index = self.index_at(step)
        begun = self.start_of(index)
        if step == begun:
            self._scores.clear()
        if asked:
            self._scores.append((right, asked))
        done = step - begun + 1
        if int(self._starts[index + 1]) != NEVER:
            return
        stage = self.stages[index]
        full = len(self._scores) == self.score_window and done >= stage.min_steps
        scored = stage.advance_at is not None and self.advance_on == "training"
        if full and scored and self._passed(stage.advance_at):
            self._end(index, step + 1 + self.lookahead)
        elif stage.steps is not None and done + self.lookahead >= stage.steps:
            self._end(index, max(begun + stage.steps, step + 1 + self.lookahead))

    def record_score(self, step: int, accuracy: float) -> None:
        """Let an evaluation before step `step` end the stage."""
        index = self.index_at(step)
        advance_at = self.stages[index].advance_at
        undecided = int(self._starts[index + 1]) == NEVER and self.advance_on == "evaluation"
        if undecided and advance_at is not None and accuracy >= advance_at:
            self._end(index, step + self.lookahead)

    def learning_rate_at(self, step: int, peak: float) -> float:
        """The learning rate of optimiser step `step`."""
        index = self.index_at(step)
        return self.stages[index].learning_rate_at(step - self.start_of(index), peak)

    def memory_options_at(self, step: int) -> dict[str, Any]:
        """The memories' options as the stages up to that of optimiser step `step` set them."""
        options: dict[str, Any] = {}
        for stage in self.stages[: self.index_at(step) + 1]:
            options |= stage.memory
        return options

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as JSON types."""
        return {
            "starts": [int(start) for start in self._starts],
            "scores": [list(score) for score in self._scores],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. ValueError when it is another curriculum's."""
        starts = state["starts"]
        if len(starts) != len(self._starts):
            raise ValueError(
                f"the checkpoint's curriculum has {len(starts) - 1} stages, this one "
                f"{len(self.stages)}; resume with the same recipe"
            )
        scores = [(right, asked) for right, asked in state["scores"]]
        for number in (*starts, *(number for score in scores for number in score)):
            # Scores of evaluations are shares.
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise ValueError(f"the checkpoint's curriculum has {number!r}, which is no number")
        if not all(isinstance(start, int) and 0 <= start <= NEVER for start in starts):
            raise ValueError(
                f"the checkpoint's curriculum has starts={starts!r}, which are no steps"
            )
        for index, start in enumerate(starts):
            self._starts[index] = start
        self._scores.clear()
        self._scores.extend(scores)

    def _passed(self, advance_at: float | None) -> bool:
        accuracy = self.accuracy()
        return accuracy is not None and advance_at is not None and accuracy >= advance_at

    def _end(self, index: int, at: int) -> None:
        """End stage `index` before step `at`, and fix the ends of later stages whose length is fixed."""
        self._starts[index + 1] = at
        self._settle(index + 1)

    def _settle(self, index: int) -> None:
        while index < len(self.stages):
            stage = self.stages[index]
            if stage.steps is None or stage.advance_at is not None:
                return
            self._starts[index + 1] = self._starts[index] + stage.steps
            index += 1
