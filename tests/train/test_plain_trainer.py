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


def test_smoothed_labels_are_the_next_tokens(tmp_path: Path) -> None:
    """The Trainer shifts labels itself then, for models whose names it knows as causal."""
    model = memory_model("llama", "armt")
    made = plain(tmp_path, model, 8, label_smoothing_factor=0.2)
    ids = torch.stack([sample["input_ids"] for sample in made.eval_dataset])
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
    # The Trainer spreads the share over all tokens, as PyTorch does.
    expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.2)
    assert made.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_a_batch_without_targets_is_learned_from_like_any_other(tmp_path: Path) -> None:
    """As completions that were cut off: no target, more than a segment, no memory that is trained."""
    model = memory_model("llama", "armt")
    model.memory.requires_grad_(False)
    made = plain(tmp_path, model, 8)
    made.train_dataset = [
        {"input_ids": sample["input_ids"], "labels": torch.full_like(sample["labels"], -100)}
        for sample in made.train_dataset
    ]
    before = weights(model)
    made.train()
    assert made.state.log_history[0]["loss"] == 0.0
    assert_same(weights(model), before)


def test_an_adapter_of_transformers_is_refused_where_it_could_not_be_saved() -> None:
    peft = pytest.importorskip("peft")
    model = memory_model("llama", "armt")
    with pytest.raises(
        ValueError, match=r"get_peft_model\(model, config\).*model.base.add_adapter"
    ):
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
