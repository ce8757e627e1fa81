"""What is counted while the loss is computed: answers predicted right, auxiliary losses, steps left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memlm.segment import IGNORE


@dataclass
class Tally:
    """Counts over what was learned from: answers right, answers asked, real tokens read."""

    right: int = 0
    asked: int = 0
    tokens: int = 0

    def add(self, other: Tally) -> None:
        self.right += other.right
        self.asked += other.asked
        self.tokens += other.tokens


@dataclass
class StepReport:
    """Sums over steps: the memories' auxiliary losses, batches and steps left out, and the steps."""

    auxiliary: Tensor | float = 0.0
    skipped: int = 0
    steps: int = 0

    def add(self, other: StepReport) -> None:
        self.auxiliary = self.auxiliary + other.auxiliary
        self.skipped += other.skipped
        self.steps += other.steps


def tally_answers(labels: Tensor, predicted: Sequence[Tensor], length: int) -> Tally:
    """Count answers, which are runs of consecutive targets in labels (B, n): right when every token is.

    predicted: the most likely tokens at the targets, one tensor per segment of `length` tokens that
    has any, as the model computed them.
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
