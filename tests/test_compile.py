"""Under torch.compile a call is compiled once: other text of the same shape needs nothing new."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from tests.cases import SEGMENT, memory_model, tokens


@pytest.fixture
def graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
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
