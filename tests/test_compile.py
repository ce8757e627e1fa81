"""Under torch.compile a call is compiled once: other text of the same shape needs nothing new."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import TrainerCallback

from memlm.train import Stage
from tests.cases import SEGMENT, memory_model, tokens
from tests.train.tiny import Endless, assert_same, stream, trainer, weights


@pytest.fixture
def graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
# Tracing a backward pass written by hand, torch makes an instance of the function, and warns of that.
@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
@pytest.mark.parametrize("name", ["armt", "titans-mac", "rmt"])
def test_nothing_is_compiled_again_after_the_second_call(name: str, graphs: None) -> None:
    model = memory_model("llama", name).float().train()
    plain = memory_model("llama", name).float().train()
    # Tracing decides whether anything is compiled again, so the backend may be the quickest.
    model.compile(backend="eager")

    def loss(one: torch.nn.Module, seed: int) -> torch.Tensor:
        ids = tokens(2, 4 * SEGMENT, seed=seed)
        labels = ids.clone()
        labels[:, ::3] = -100
        found = one(ids, labels=labels, bptt_depth=2).loss
        found.backward()
        return found.detach()

    for seed in (0, 1):
        loss(model, seed)
    made = counters["stats"]["unique_graphs"]
    assert made > 0
    for seed in (2, 3):
        torch.testing.assert_close(loss(model, seed), loss(plain, seed))
    assert counters["stats"]["unique_graphs"] == made and not counters["recompiles"]


class Made(TrainerCallback):
    """How many graphs there are after each step."""

    def __init__(self) -> None:
        self.graphs: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.graphs.append(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_the_trainers_compilation_comes_to_rest_and_changes_no_weight(
    tmp_path: Path, graphs: None
) -> None:
    found = []
    for compiled in (False, True):
        # In float64: the sums are taken in another order, and these weights are large.
        model = memory_model("llama", "armt")
        data = stream(Endless(1, questions=False), Stage(min_segments=4, max_segments=4))
        made, given = Made(), {}
        if compiled:
            given = {"torch_compile": True, "torch_compile_backend": "eager"}
        trainer(model, tmp_path, data, [made], max_steps=5, **given).train()
        found.append(weights(model))
        if compiled:
            assert made.graphs[0] > 0 and len(set(made.graphs[1:])) == 1
            assert not counters["recompiles"]
    assert_same(*found)
