"""Documents in training may start from states that others left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from memlm.state import MemoryState
from memlm.train import Piece, PieceSource, Stage
from memlm.train.trainer.initial import initial_state
from tests.cases import SEGMENT, VOCAB, memory_model
from tests.train.tiny import Endless, assert_same, stream, trainer, weights


def states(rows: int, seed: int = 0) -> MemoryState:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "a": torch.randn(rows, 3, 2, generator=generator),
        "n": torch.randint(9, (rows,), generator=generator),
    }
    return MemoryState(tensors, rows)


def test_carry_goes_on_from_the_rows_own_state() -> None:
    fresh, left = states(4, 1), states(4, 2)
    found = initial_state("carry", 1.0, fresh, left, (0, 1))
    assert all(torch.equal(found[name], left[name]) for name in ("a", "n"))
    # A batch of another size, as the last one of an epoch: the rows that there are, round a circle.
    found = initial_state("carry", 1.0, states(6, 1), left, (0, 1))
    assert torch.equal(found["a"], left["a"][[0, 1, 2, 3, 0, 1]])


def test_pass_starts_from_another_row() -> None:
    fresh, left = states(5, 1), states(5, 2)
    seen = set()
    for step in range(40):
        found = initial_state("pass", 1.0, fresh, left, (0, step))["a"]
        sources = [next(i for i in range(5) if torch.equal(row, left["a"][i])) for row in found]
        assert sorted(sources) == list(range(5)) and all(i != s for i, s in enumerate(sources))
        seen.add(tuple(sources))
        again = initial_state("pass", 1.0, fresh, left, (0, step))["a"]
        assert torch.equal(found, again)
    assert len(seen) == 4


def test_as_many_rows_as_the_probability_says() -> None:
    fresh, left = states(1000, 1), states(1000, 2)
    found = initial_state("carry", 0.3, fresh, left, (0, 1))["a"]
    taken = (found == left["a"]).all(-1).all(-1)
    assert (taken | (found == fresh["a"]).all(-1).all(-1)).all()
    assert 0.25 < float(taken.float().mean()) < 0.35
    for kind, share, given in (("zero", 1.0, left), ("pass", 0.0, left), ("pass", 1.0, None)):
        assert initial_state(kind, share, fresh, given, (0, 1)) is fresh


def test_fitted_noise_is_like_what_was_left() -> None:
    left = MemoryState(
        {"a": 5 + 2 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))}, 64
    )
    fresh = MemoryState({"a": torch.zeros(4000, 3)}, 4000)
    found = initial_state("fitted", 1.0, fresh, left, (0, 1))["a"]
    assert (found >= left["a"].amin(0)).all() and (found <= left["a"].amax(0)).all()
    torch.testing.assert_close(found.mean(0), left["a"].mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(found.std(0), left["a"].std(0), rtol=0.1, atol=0)
    assert len(torch.unique(found, dim=0)) > 3000


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.seen.append(logs["loss"])


@pytest.mark.parametrize("kind", ["stream", "data set"])
def test_training_starts_where_the_last_documents_ended(tmp_path: Path, kind: str) -> None:
    model = memory_model("llama", "armt")
    rng = np.random.default_rng(0)
    # All alike: either kind of data is shuffled.
    documents = [rng.integers(3, VOCAB, 2 * SEGMENT)] * 6
    if kind == "stream":
        shift = [np.append(one[1:], -100) for one in documents]
        pieces = [Piece(one, targets) for one, targets in zip(documents, shift, strict=True)]
        data: Any = stream(PieceSource(pieces), Stage(max_segments=2))
    else:
        data = [{"input_ids": one.tolist()} for one in documents]
    told = Losses()
    values = {"initial_state": "carry", "max_steps": 3, "learning_rate": 0.0}
    made = trainer(model, tmp_path, data, [told], **values)
    made.train()
    state = None
    model.eval()
    with torch.no_grad():
        for step in range(3):
            ids = torch.tensor(np.stack(documents[2 * step : 2 * step + 2]))
            out = model(ids, labels=ids, memory_state=state)
            assert told.seen[step] == pytest.approx(float(out.loss), rel=1e-4)
            state = out.memory_state
    ids = torch.tensor(np.stack(documents[:2]))
    # Evaluation starts from nothing.
    rows = [{"input_ids": one.tolist()} for one in documents[:2]]
    assert made.evaluate(rows)["eval_loss"] == pytest.approx(
        float(model(ids, labels=ids).loss.detach()), rel=1e-5
    )


def test_a_probability_of_zero_changes_nothing(tmp_path: Path) -> None:
    def run(**values: Any) -> dict[str, torch.Tensor]:
        model = memory_model("llama", "armt")
        data = stream(Endless(pieces=1), Stage(max_segments=2))
        trainer(model, tmp_path, data, max_steps=3, **values).train()
        return weights(model)

    plain = run()
    assert_same(run(initial_state="pass", initial_state_probability=0.0), plain)
    passed = run(initial_state="pass")
    assert any((passed[name] - plain[name]).abs().max() > 1e-6 for name in plain)


@pytest.mark.parametrize(
    ("values", "memory", "words"),
    [
        ({"initial_state": "noise"}, "armt", r"initial_state='noise' is unknown.*'fitted'"),
        ({"initial_state_probability": 1.5}, "armt", r"initial_state_probability=1.5"),
        (
            {"initial_state": "pass", "per_device_train_batch_size": 1},
            "armt",
            "per_device_train_batch_size=2",
        ),
        ({"initial_state": "fitted"}, "knn", r"'fitted' cannot draw.*'pass'"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, values: dict, memory: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(memory_model("llama", memory), tmp_path, stream(Endless(pieces=1)), **values)
