"""Muon for the hidden matrices: each optimizer steps its own parameters, as it would alone."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from memlm import MemLMForCausalLM
from memlm.memory import GatedDeltaConfig
from memlm.train import Stage
from memlm.train.trainer.muon import WithMuon, hidden_matrices
from tests.cases import memory_model
from tests.train.tiny import Endless, assert_same, stream, trainer, weights

RATE, MUON_RATE = 0.01, 0.02
ADAM = {"betas": (0.9, 0.98), "weight_decay": 0.1}


def model() -> MemLMForCausalLM:
    return memory_model("llama", GatedDeltaConfig(num_heads=2, head_dim=8)).train()


def test_hidden_matrices_are_no_embeddings_heads_or_gates() -> None:
    made = model()
    names = {id(p): n for n, p in made.named_parameters()}
    found = {names[id(p)] for p in hidden_matrices(made)}
    ends = {name.rsplit(".", 2)[-2] for name in found}
    assert {"q_proj", "down_proj", "o_proj"} <= ends
    assert not ends & {"embed_tokens", "lm_head", "b_proj", "a_proj"}
    assert any("memory" in name for name in found) and any("mlp" in name for name in found)


def test_each_steps_its_own_as_it_would_alone() -> None:
    one, two = model(), model()
    two.load_state_dict(one.state_dict())
    matrices = hidden_matrices(one)
    adam = torch.optim.AdamW(one.parameters(), lr=RATE, **ADAM)
    both = WithMuon(adam, matrices, MUON_RATE)
    mine = hidden_matrices(two)
    rest = [p for p in two.parameters() if all(p is not m for m in mine)]
    apart = (
        torch.optim.Muon(mine, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, **ADAM),
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
        both.step()
        for optimizer in apart:
            optimizer.step()
    assert_same(weights(one), weights(two))


def test_what_was_saved_goes_on_as_if_never_stopped() -> None:
    one = model()
    both = WithMuon(torch.optim.AdamW(one.parameters(), lr=RATE), hidden_matrices(one), MUON_RATE)

    def step(of: MemLMForCausalLM, optimizer: WithMuon, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in of.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()

    step(one, both, 0)
    two, saved = copy.deepcopy(one), copy.deepcopy(both.state_dict())
    again = WithMuon(torch.optim.AdamW(two.parameters(), lr=1.0), hidden_matrices(two), 1.0)
    again.load_state_dict(saved)
    step(one, both, 1)
    step(two, again, 1)
    assert_same(weights(two), weights(one))


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    stages = Stage(max_segments=2, steps=2), Stage(max_segments=2, learning_rate=0.05)
    values = {"optim": "adamw_torch", "muon_learning_rate": MUON_RATE, "max_steps": 4}
    start = model()
    whole = copy.deepcopy(start)
    made = trainer(whole, tmp_path / "whole", stream(Endless(), *stages), **values)
    made.train()
    # The stage's rate is half the peak of 0.1, and scales both.
    assert {g["lr"] for g in made.optimizer.param_groups} == {0.05, MUON_RATE / 2}
    saving = {**values, "save_strategy": "steps", "save_steps": 3}
    first = trainer(copy.deepcopy(start), tmp_path / "cut", stream(Endless(), *stages), **saving)
    first.train()
    resumed = copy.deepcopy(start)
    trainer(resumed, tmp_path / "cut", stream(Endless(), *stages), **saving).train(
        resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3")
    )
    assert_same(weights(resumed), weights(whole))
    moved = zip(start.parameters(), whole.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, data = model(), stream(Endless())
    with pytest.raises(ValueError, match=r"muon_learning_rate=-1.0 must be 0 or more"):
        trainer(made, tmp_path, data, muon_learning_rate=-1.0)
    both = {"muon_learning_rate": 0.1, "memory_learning_rate": 0.2}
    with pytest.raises(ValueError, match=r"memory_learning_rate=0.2 and muon_learning_rate=0.1"):
        trainer(made, tmp_path, data, **both).train()
    with pytest.raises(ValueError, match=r"finds no hidden matrix"):
        WithMuon(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=1.0), [], 0.1)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"needs torch 2.9"):
        trainer(made, tmp_path, data, muon_learning_rate=0.1).train()
