"""Training: a Trainer with truncated backpropagation through time, curricula, data and recipes.

Names are imported on first use, so that checking a recipe loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "BabilongOptions": "memlm.train.options",
    "BabilongSource": "memlm.train.babilong",
    "Collator": "memlm.train.data",
    "Curriculum": "memlm.train.curriculum",
    "DocumentSource": "memlm.train.documents",
    "MemLMTrainer": "memlm.train.trainer",
    "MemLMTrainingArguments": "memlm.train.trainer",
    "Piece": "memlm.train.data",
    "PieceSource": "memlm.train.data",
    "Question": "memlm.train.data",
    "Recipe": "memlm.train.recipe",
    "Stage": "memlm.train.curriculum",
    "TrainResult": "memlm.train.folder",
    "TrainingStream": "memlm.train.data",
    "RowSource": "memlm.train.rows",
    "plan": "memlm.train.run",
    "train": "memlm.train.run",
    "train_tokenizer": "memlm.train.tokenizer",
}
__all__ = [
    "BabilongOptions",
    "BabilongSource",
    "Collator",
    "Curriculum",
    "DocumentSource",
    "MemLMTrainer",
    "MemLMTrainingArguments",
    "Piece",
    "PieceSource",
    "Question",
    "Recipe",
    "RowSource",
    "Stage",
    "TrainResult",
    "TrainingStream",
    "plan",
    "train",
    "train_tokenizer",
]

if TYPE_CHECKING:
    from memlm.train.babilong import BabilongSource
    from memlm.train.curriculum import Curriculum, Stage
    from memlm.train.data import Collator, Piece, PieceSource, Question, TrainingStream
    from memlm.train.documents import DocumentSource
    from memlm.train.folder import TrainResult
    from memlm.train.options import BabilongOptions
    from memlm.train.recipe import Recipe
    from memlm.train.rows import RowSource
    from memlm.train.run import plan, train
    from memlm.train.tokenizer import train_tokenizer
    from memlm.train.trainer import MemLMTrainer, MemLMTrainingArguments


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'memlm.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
