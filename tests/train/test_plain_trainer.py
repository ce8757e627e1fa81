"""transformers' own Trainer, without anything of ours around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from memlm.memory import ARMTConfig
from tests.cases import SEGMENT, memory_model, tokens
from tests.train.tiny import assert_same, weights


def plain(folder: Path, model: Any, rows: int, **values: Any) -> Trainer:
    """A Trainer over eight documents of three segments."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 8 // rows,
            "optim": "sgd",
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **values,
        },
    )
    data = [{"input_ids": row, "labels": row} for row in tokens(8, 3 * SEGMENT)]
    made = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    made.remove_callback(PrinterCallback)
    return made


def test_auxiliary_losses_are_the_same_however_a_batch_is_split(tmp_path: Path) -> None:
    results = []
    for rows in (8, 4):
        model = memory_model("llama", ARMTConfig(num_memory_tokens=3, d_mem=8, write_cost=0.9))
        made = plain(tmp_path, model, rows)
        made.train()
        results.append((made.state.log_history[0]["loss"], weights(model)))
    for loss, found in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_same(found, results[0][1])


def test_evaluations_have_a_loss(tmp_path: Path) -> None:
    model = memory_model("llama", "armt")
    made = plain(tmp_path, model, 8)
    ids = torch.stack([sample["input_ids"] for sample in made.eval_dataset])
    with torch.no_grad():
        expected = float(model(ids, labels=ids).loss)
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
