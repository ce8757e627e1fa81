"""A loss over a large vocabulary: in pieces, and the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm import logits
from tests.cases import SEGMENT, VOCAB, memory_model, tokens


def loss_and_gradients(again: bool = False) -> tuple[list[torch.Tensor], list[int]]:
    """Of one call with every third token no target, and how many rows of logits were made at a time."""
    model = memory_model("llama", "armt").train()
    if again:
        model.gradient_checkpointing_enable()
    rows = []
    head = model.backbone.logits
    model.backbone.logits = lambda x: rows.append(x.numel() // x.shape[-1]) or head(x)  # type: ignore
    ids = tokens(3, 3 * SEGMENT)
    labels = ids.clone()
    labels[:, ::3] = -100
    loss = model(ids, labels=labels).loss
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *found], rows


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("at_once", [1, 5 * VOCAB, 7 * VOCAB + 1])
def test_a_loss_in_pieces_is_the_whole_loss(
    monkeypatch: pytest.MonkeyPatch, at_once: int, again: bool
) -> None:
    whole, rows = loss_and_gradients()
    assert max(rows) > 7
    monkeypatch.setattr(logits, "AT_ONCE", at_once)
    pieces, rows = loss_and_gradients(again)
    assert max(rows) == max(1, at_once // VOCAB)
    assert len(pieces) == len(whole) > 10
    for one, other in zip(pieces, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_without_gradients_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, hidden = torch.randn(VOCAB, 4).double(), torch.randn(10, 4).double()
    targets = torch.randint(VOCAB, (10,))
    targets[3] = -100
    rows: list[int] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        rows.append(x.shape[1])
        return x @ weight.T

    monkeypatch.setattr(logits, "AT_ONCE", 4 * VOCAB)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.no_grad():
        found = logits.cross_entropy_in_pieces(head, hidden, targets, VOCAB)
    torch.testing.assert_close(found, expected)
    assert rows == [4, 4, 2]
