"""Nothing waits for an accelerator: what a call asks about values does not grow with its segments."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from memlm.segment import cut
from memlm.watch import EVERY
from tests.cases import (
    A_SITE_EACH,
    CASES,
    LAW_FAMILIES,
    SEGMENT,
    memory_model,
    standing,
    tokens,
)
from tests.memory.test_laws import SILENT
from tests.waits import Waits

# transformers' own questions, one each time its decoder runs: whether positions are packed documents, where
# there is no mask, and whether a mask says anything.
THEIRS = ("find_packed_sequence_indices", "_ignore_causal_mask_sdpa")


def asked(name: str, segments: int, how: str) -> tuple[Counter[str], int]:
    """What one call asks, without transformers' own questions, and how many of those are too many."""
    model = memory_model(standing(name, LAW_FAMILIES[0]), name)
    ids = tokens(2, segments * SEGMENT)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    labels = ids.clone()
    labels[:, ::3] = -100
    model.train(how == "train")
    decoded, decode = [], model.backbone.decode
    with Waits() as waits, pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.backbone, "decode", lambda *given: decoded.append(0) or decode(*given))
        if how == "train":
            model(ids, attention_mask=mask, labels=labels, bptt_depth=2).loss.backward()
        else:
            model.read(cut(ids, mask.bool(), None, SEGMENT))
    own = [line for line in waits.found if not any(theirs in line for theirs in THEIRS)]
    return Counter(own), len(waits.found) - len(own) - len(decoded)


# Where nothing can be passed over in silence, reading is a part of training.
@pytest.mark.parametrize(
    ("how", "name"),
    [
        *(("train", name) for name in ("none", *CASES)),
        *(
            pytest.param("read", name, marks=() if by_default else pytest.mark.slow)
            for name in ("none", *CASES)
            for by_default in [name in ("none", *SILENT, *A_SITE_EACH)]
        ),
    ],
)
def test_a_segment_asks_nothing(name: str, how: str) -> None:
    (short, theirs), (long, more) = asked(name, 2, how), asked(name, 4, how)
    assert long == short, f"a segment makes the host wait: {dict(long - short)}"
    assert more <= theirs, "more than one question of transformers when its decoder runs"


def test_states_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    (few, _), (many, _) = asked("armt", 2, "read"), asked("armt", EVERY + 2, "read")
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
