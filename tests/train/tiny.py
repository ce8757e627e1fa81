"""What the training tests share: batches, trainers and streams small enough to check by hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memlm.modeling import MemLMForCausalLM
from memlm.segment import IGNORE
from memlm.train import (
    Curriculum,
    MemLMTrainer,
    MemLMTrainingArguments,
    Piece,
    Question,
    Stage,
    TrainingStream,
)
from memlm.train.data import shifted
from tests.cases import SEGMENT, VOCAB

# Llama takes its norms in float32 whatever the model, so that a sum over rows is that exact.
TOLERANCE = 1e-6


def ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, length)


def text_piece(length: int, seed: int = 0) -> Piece:
    """A document whose every token is a target."""
    tokens = ids(length, seed)
    return Piece(tokens, shifted(tokens))


def answer_piece(length: int, seed: int = 0, answer: int = 2) -> Piece:
    """A document of which only the last tokens are targets."""
    tokens = ids(length, seed)
    labels = np.full(length, IGNORE)
    labels[-answer:] = tokens[-answer:]
    return Piece(tokens, shifted(labels))


class Endless:
    """A source of random documents of several pieces, with questions behind every segment."""

    def __init__(self, pieces: int = 3, questions: bool = True) -> None:
        self.pieces, self.questions = pieces, questions

    def single_piece(self, stages: Sequence[Stage]) -> bool:
        return self.pieces == 1

    def document(self, ordinal: int, stage: Stage) -> Iterator[Piece]:
        rng = np.random.default_rng([7, ordinal])
        count = self.pieces if self.pieces == 1 else int(rng.integers(1, self.pieces + 1))
        for _ in range(count):
            segments = int(rng.integers(stage.min_segments, stage.max_segments + 1))
            tokens = rng.integers(3, VOCAB, segments * SEGMENT)
            # One answer to all questions: learned within a few steps.
            asked = tuple(
                Question(s, np.append(rng.integers(3, VOCAB, 3), 5), 1) for s in range(segments)
            )
            targets = shifted(tokens)
            yield Piece(tokens, targets, asked if self.questions else ())


def arguments(folder: Path, **values: Any) -> MemLMTrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return MemLMTrainingArguments(output_dir=str(folder), **{**defaults, **values})


def stream(source: Any, *stages: Stage, **options: Any) -> TrainingStream:
    return TrainingStream(source, Curriculum(stages or [Stage(max_segments=2)], **options))


def trainer(
    model: MemLMForCausalLM, folder: Path, data: Any, callbacks: Any = None, **values: Any
) -> MemLMTrainer:
    from transformers import PrinterCallback

    made = MemLMTrainer(model, arguments(folder, **values), train_dataset=data, callbacks=callbacks)
    made.remove_callback(PrinterCallback)
    return made


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value,
            theirs[name],
            rtol=TOLERANCE,
            atol=TOLERANCE,
            msg=lambda text, name=name: f"{name}: {text}",
        )
