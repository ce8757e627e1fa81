"""A run that is killed and resumed is the run that was never killed."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from memlm.train import MemLMTrainer, Stage, TrainingStream
from memlm.train.folder import last_checkpoint
from memlm.train.trainer import CURRICULUM_FILE
from memlm.train.trainer.checkpoint import SEAL, load_position, save_position
from tests.cases import memory_model
from tests.train.tiny import Endless, stream, trainer, weights

STEPS, STOP = 14, 8


class Kill(TrainerCallback):
    """Die in the middle of a step, some steps behind the last checkpoint."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP + 3:
            raise KeyboardInterrupt


def made(folder: Path, kind: str, callbacks: Any = None, **given: Any) -> MemLMTrainer:
    values: dict[str, Any] = {
        "max_steps": STEPS,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": STOP // 2,
        "track_accuracy": True,
    }
    # A score that is reached in the run, so that the second stage's start is a decision to restore.
    stages = [
        Stage(max_segments=1, advance_at=0.3, min_steps=6, warmup_steps=2),
        Stage(max_segments=3, learning_rate=2e-3),
    ]
    pieces = 1
    if kind == "carried":
        pieces, values["gradient_accumulation_steps"] = 4, 2
    elif kind == "window":
        values |= {"window_step": "window", "bptt_depth": 1}
    elif kind == "passed":
        values |= {"initial_state": "pass", "initial_state_probability": 0.7}
    elif kind == "workers":
        values["dataloader_num_workers"] = 2
    torch.manual_seed(0)
    model = memory_model("llama", "armt", num_hidden_layers=1)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    data = stream(Endless(pieces), *stages, score_window=4)
    return trainer(model, folder, data, callbacks, **{**values, **given})


@pytest.mark.parametrize("kind", ["documents", "carried", "passed", "window", "workers"])
def test_a_killed_run_resumes_to_the_unbroken_one(tmp_path: Path, kind: str) -> None:
    whole = made(tmp_path / "whole", kind)
    whole.train()
    killed = made(tmp_path / "killed", kind, [Kill()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = made(tmp_path / "killed", kind)
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint is not None and checkpoint.endswith(f"checkpoint-{STOP}")
    again.train(resume_from_checkpoint=checkpoint)

    def told(run: MemLMTrainer) -> list[tuple[Any, ...]]:
        names = ("step", "loss", "stage", "accuracy", "learning_rate")
        return [tuple(line[n] for n in names) for line in run.state.log_history if "loss" in line]

    assert told(again) == told(whole)
    assert {line[2] for line in told(whole)} == {0, 1}
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


def test_a_checkpoint_holds_the_usual_files_and_the_stream(tmp_path: Path) -> None:
    from memlm.modeling import MemLMForCausalLM

    run = made(tmp_path, "carried", max_steps=3, save_steps=3)
    run.train()
    folder = tmp_path / "checkpoint-3"
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= names
    assert {CURRICULUM_FILE, "stream-0.json", "memory-0-0.safetensors"} <= names
    again = MemLMForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, value in weights(run.model).items():
        assert torch.equal(value, weights(again)[name]), name


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for step, text in ((5, json.dumps({"global_step": 5})), (10, '{"global_st')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-15").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


def test_a_checkpoint_without_a_stream_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path, "documents", max_steps=2, save_steps=1)
    run.train()
    folder = tmp_path / "checkpoint-1"
    (folder / "stream-0.json").unlink()
    with pytest.raises(ValueError, match=r"stream-0\.json is not as it was written"):
        made(tmp_path, "documents").train(resume_from_checkpoint=str(folder))
    # As one of another trainer, which has neither.
    (folder / SEAL).unlink()
    (folder / CURRICULUM_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no curriculum\.json"):
        made(tmp_path, "documents").train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_counts_once_every_process_has_written_its_part(tmp_path: Path) -> None:
    """The files are listed last, and older checkpoints go only then."""
    made(tmp_path, "documents", max_steps=2, save_steps=1, save_total_limit=1).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    folder = tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path) == str(folder)
    # Process 0's last file is there, but not what is written when all are done.
    seal = (folder / SEAL).read_bytes()
    (folder / SEAL).unlink()
    assert last_checkpoint(tmp_path) is None
    (folder / SEAL).write_bytes(seal)
    weights_file = folder / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is not as it was written"):
        last_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_passed_over_for_an_earlier_one(tmp_path: Path) -> None:
    made(tmp_path, "documents", max_steps=2, save_steps=1).train()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


def test_a_run_that_was_over_is_not_trained_on(tmp_path: Path) -> None:
    """Killed after its last checkpoint and before its result, it ends where it ended."""
    whole = made(tmp_path, "documents", max_steps=4, save_steps=2)
    whole.train()
    again = made(tmp_path, "documents", max_steps=4, save_steps=2)
    again.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert again.state.global_step == 4
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(again.model)[name]), name


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_more_or_fewer_processes_go_on_at_the_step_and_read_nothing_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pieces: int, before: int, after: int
) -> None:
    def dealt(rank: int, world: int) -> TrainingStream:
        data = stream(Endless(pieces), Stage(max_segments=2), score_window=4)
        data.deal(batch_size=2, accumulation=2, rank=rank, world=world)
        return data

    def read(data: TrainingStream, batches: int) -> list[int]:
        found = []
        for batch in islice(iter(data), batches):
            data.consumed(batch["cursor"])
            # Begun in this batch: at their first piece.
            found += [number for number, piece in batch["cursor"].tolist() if piece == 0]
        return found

    begun = []
    for rank in range(before):
        data = dealt(rank, before)
        begun += read(data, 8)
        save_position(tmp_path, data, rank, curriculum=rank == 0)
    assert len(set(begun)) == len(begun)
    later = []
    for rank in range(after):
        data = dealt(rank, after)
        load_position(tmp_path, data, rank)
        assert data.step == 4
        later += read(data, 4)
        # What was dealt anew can be saved and gone on with.
        again = dealt(rank, after)
        again.load_state_dict(data.state_dict())
        assert read(again, 3) == read(data, 3)
    assert not set(later) & set(begun) and len(set(later)) == len(later)
    # Where a document is one batch's, fewer are left out than there are processes.
    if pieces == 1:
        assert max(later) - len(begun) - len(later) < after
    assert f"is of {before} processes, and there are {after}" in caplog.text
