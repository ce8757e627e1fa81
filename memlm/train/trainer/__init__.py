"""transformers' Trainer with truncated backpropagation through the segments of a document.

arguments: its TrainingArguments. plan: a batch as segments, questions and windows. window: one window
through the model. tally: right answers. checkpoint: the position in the data. trainer: the Trainer.
"""

from memlm.train.trainer.arguments import MemLMTrainingArguments
from memlm.train.trainer.checkpoint import CURRICULUM_FILE
from memlm.train.trainer.plan import count_targets
from memlm.train.trainer.trainer import MemLMTrainer

__all__ = ["CURRICULUM_FILE", "MemLMTrainer", "MemLMTrainingArguments", "count_targets"]
