"""Nothing waits for an accelerator: what a call asks about values does not grow with its segments."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from memlm.memory import memory_class
from memlm.segment import cut
from memlm.watch import EVERY
from tests.cases import CASES, LAW_FAMILIES, SEGMENT, memory_model, standing, tokens
from tests.waits import Waits


def asked(name: str, segments: int, how: str) -> Counter[str]:
    """What one call asks, without transformers' own question: whether positions are packed documents."""
    model = memory_model(standing(name, LAW_FAMILIES[0]), name)
    ids = tokens(2, segments * SEGMENT)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = ids.clone()
    labels[:, ::3] = -100
    model.train(how == "train")
    with Waits() as waits:
        if how == "train":
            model(ids, attention_mask=mask, labels=labels, bptt_depth=2).loss.backward()
        else:
            model.read(cut(ids, mask.bool(), None, SEGMENT))
    own = [line for line in waits.found if "find_packed_sequence_indices" not in line]
    others = len(waits.found) - len(own)
    runs = 2 if name != "none" and memory_class(name).repeats_inner else 1
    assert others <= runs * segments
    return Counter(own)


@pytest.mark.parametrize("how", ["train", "read"])
@pytest.mark.parametrize("name", ["none", *CASES])
def test_a_segment_asks_nothing(name: str, how: str) -> None:
    short, long = asked(name, 2, how), asked(name, 5, how)
    assert long == short, f"a segment makes the host wait: {dict(long - short)}"


def test_states_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = asked("armt", 2, "read"), asked("armt", EVERY + 2, "read")
    assert (many - few).total() == 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: torch.equal(x, x),
        lambda x: x.masked_select(x > 0),
        lambda x: [1, 2][x.sum().long()],
        lambda x: x.cpu(),
        lambda x: x.unique(),
    ],
)
def test_questions_are_noticed(ask) -> None:
    with Waits() as waits:
        torch.ones(3) + 1
    assert not waits.found
    with Waits() as waits:
        ask(torch.ones(3) / 3)
    assert waits.found
