"""How far back predictions reach."""

from __future__ import annotations

import pytest
import torch

from memlm.eval import remembrance
from tests.cases import SEGMENT, memory_model, tokens


@torch.no_grad()
def test_it_is_the_distance_to_the_document_without_its_beginning() -> None:
    model, ids = memory_model("llama", "armt"), tokens(3, 5 * SEGMENT)
    found = remembrance(model.train(), ids, [0, 2, 4])
    assert model.training
    model.eval()
    whole = model(ids).logits[:, -SEGMENT:].softmax(-1)
    for kept in (0, 2):
        cut = model(ids[:, (4 - kept) * SEGMENT :]).logits[:, -SEGMENT:].softmax(-1)
        expected = float((whole - cut).abs().sum(-1).mean() / 2)
        assert found[kept] == pytest.approx(expected, rel=1e-4) and 0 < expected < 1
    assert found[4] == pytest.approx(0.0, abs=1e-7)


def test_without_a_memory_there_is_nothing_to_lose() -> None:
    model = memory_model("llama", "none")
    assert remembrance(model, tokens(2, 4 * SEGMENT), [0, 1]) == {0: 0.0, 1: 0.0}


@pytest.mark.parametrize(
    ("length", "segments", "words"),
    [
        (SEGMENT, [0], "at least two"),
        (2 * SEGMENT + 1, [0], "whole"),
        (2 * SEGMENT, [2], "segments=2"),
    ],
)
def test_what_cannot_be_is_refused(length: int, segments: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        remembrance(memory_model("llama", "armt"), tokens(1, length), segments)
