"""Learning rates: the memories' own beside the base's, and those that the stages of a curriculum set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from memlm.train.data import TrainingStream
from memlm.train.trainer.arguments import MemLMTrainingArguments


def set_memory_rates(
    optimizer: Any, memory: Iterable[nn.Parameter], arguments: MemLMTrainingArguments
) -> None:
    """Give the parameters of the memories groups of their own, with their learning rate and weight decay.

    Before the first step. Where weight decay is 0 for a kind of parameter, such as biases, it stays 0.
    """
    rate, decay = arguments.memory_learning_rate, arguments.memory_weight_decay
    own = {id(parameter) for parameter in memory}
    for group in list(optimizer.param_groups):
        mine = [parameter for parameter in group["params"] if id(parameter) in own]
        if not mine:
            continue
        changed = {name: value for name, value in group.items() if name != "params"}
        if rate is not None:
            changed["lr"] = rate
        if decay is not None and (group.get("weight_decay") or not arguments.weight_decay):
            changed["weight_decay"] = decay
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
        optimizer.add_param_group({**changed, "params": mine})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def stage_scheduler(stream: TrainingStream, optimizer: Any, peak: float) -> Any:
    """A schedule that follows the learning rates of the stages; `peak` is the arguments' own."""

    def factor(_: int) -> float:
        return stream.curriculum.learning_rate_at(stream.step, peak) / (peak or 1.0)

    if peak == 0:
        if len({group["lr"] for group in optimizer.param_groups}) > 1:
            raise ValueError(
                "learning_rate=0 leaves no scale for memory_learning_rate to follow the stages' rates by; "
                "give a learning_rate"
            )
        # The factor is then the stage's rate itself.
        for group in optimizer.param_groups:
            group["initial_lr"] = 1.0
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
