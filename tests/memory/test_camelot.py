"""CAMELoT against a list of modes: written token by token, and the nearest, or all of them, read."""

from __future__ import annotations

import pytest
import torch

from memlm.memory import QKV, CAMELoTConfig
from memlm.memory.camelot import CAMELoT
from tests.memory.heads import EXACT, SCALE, B, D, G, H, T, dims, local, masks, segments, softmax


def cell(groups: int = G, **options) -> CAMELoT:
    config = CAMELoTConfig(**{"num_modes": 4, "merge_similarity": 0.3, **options})
    return CAMELoT(CAMELoT.resolve(config, dims(groups)), dims(groups)).double()


class Row:
    """One row's modes as they are printed: key, value, count, and tokens since it was touched."""

    def __init__(self, memory: CAMELoT) -> None:
        self.memory, self.modes, self.merged = memory, [], 0

    def nearest(self, key: torch.Tensor) -> tuple[float, int]:
        found = [
            (float(key @ mode[0]) / float(key.norm() * mode[0].norm()), i)
            for i, mode in enumerate(self.modes)
        ]
        return max(found) if found else (-2.0, -1)

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        similarity, at = self.nearest(key)
        for mode in self.modes:
            mode[3] += 1
        if similarity > self.memory.config.merge_similarity:
            old_key, old_value, count, _ = self.modes[at]
            self.merged += 1
            self.modes[at] = [
                (count * old_key + key) / (count + 1),
                (count * old_value + value) / (count + 1),
                count + 1,
                0,
            ]
            return
        fresh = [key, value, 1, 0]
        if len(self.modes) < self.memory.config.num_modes:
            self.modes.append(fresh)
        else:
            oldest = max(range(len(self.modes)), key=lambda i: self.modes[i][3])
            self.modes[oldest] = fresh

    def read(self, x: QKV, row: int, head: int, t: int) -> torch.Tensor:
        groups = x.k.shape[1]
        group = head // (H // groups)
        q = SCALE * x.q[row, head, t]
        entries = [(float(q @ x.k[row, group, i]), x.v[row, group, i]) for i in range(t + 1)]
        read = self.modes
        if read and self.memory.config.read == "nearest":
            read = [read[self.nearest(x.k[row, :, t].flatten())[1]]]
        mine = slice(group * D, (group + 1) * D)
        entries += [(float(q @ key[mine]), value[mine]) for key, value, *_ in read]
        weights = softmax([score for score, _ in entries])
        return sum(w * value for w, (_, value) in zip(weights, entries, strict=True))


@pytest.mark.parametrize("groups", [1, G, H])
@pytest.mark.parametrize(
    ("least", "read"), [(-1.0, "nearest"), (0.3, "nearest"), (2.0, "nearest"), (0.3, "all")]
)
@torch.no_grad()
def test_equals_modes_written_one_token_after_the_other(
    groups: int, least: float, read: str
) -> None:
    """From -1 up nearly everything is merged; above 1 nothing is."""
    memory = cell(groups, merge_similarity=least, read=read)
    state, rows = memory.init_state(B), [Row(memory) for _ in range(B)]
    for x, mask in zip(segments(6, groups), masks(6), strict=True):
        y, state = memory(x, state, local, mask=mask)
        for row in range(B):
            for head in range(H):
                for t in range(T):
                    expected = rows[row].read(x, row, head, t)
                    torch.testing.assert_close(y[row, head, t], expected, **EXACT)
            for t in mask[row].nonzero().flatten().tolist():
                rows[row].write(x.k[row, :, t].flatten(), x.v[row, :, t].flatten())
        for index, row in enumerate(rows):
            # Modes in the order in which they were touched, the last first.
            expected = sorted(row.modes, key=lambda mode: mode[3])
            held = state.age[index].argsort()[: len(expected)]
            keys, values, counts, _ = zip(*expected, strict=True)
            torch.testing.assert_close(state.keys[index, held], torch.stack(keys), **EXACT)
            torch.testing.assert_close(state.values[index, held], torch.stack(values), **EXACT)
            torch.testing.assert_close(
                1 / state.rate[index, held] - 1, torch.tensor(counts).double(), **EXACT
            )
            rest = state.age[index].argsort()[len(expected) :]
            assert (state.rate[index, rest] == 1).all() and not state.keys[index, rest].any()
    merged = sum(row.merged for row in rows)
    assert (merged == 0) == (least == 2.0)


@torch.no_grad()
def test_at_both_ends_it_is_a_queue_and_a_running_mean() -> None:
    parts = segments(3)
    text = [torch.cat([x[i] for x in parts], 2).transpose(1, 2).flatten(2) for i in (1, 2)]
    for options, expected in (
        ({"merge_similarity": 2.0}, [t[:, -4:] for t in text]),
        ({"merge_similarity": -1.0, "num_modes": 1}, [t.mean(1, keepdim=True) for t in text]),
    ):
        memory = cell(**options)
        state = memory.init_state(B)
        for x in parts:
            _, state = memory(x, state, local, mask=None)
        order = state.age.argsort(dim=1, descending=True).unsqueeze(2).expand(-1, -1, G * D)
        for found, wanted in zip((state.keys, state.values), expected, strict=True):
            torch.testing.assert_close(found.gather(1, order), wanted, **EXACT)


@torch.no_grad()
def test_all_modes_unmerged_are_attention_to_the_past() -> None:
    """With room for every token `read="all"` is the softmax over all that was read."""
    memory, parts = cell(num_modes=2 * T, merge_similarity=2.0, read="all"), segments(3)
    state = memory.init_state(B)
    for x in parts[:2]:
        _, state = memory(x, state, local, mask=None)
    past = QKV(parts[2].q, *(torch.cat([p[i] for p in parts], 2) for i in (1, 2)))
    expected = local(past)
    torch.testing.assert_close(memory(parts[2], state, local, mask=None)[0], expected, **EXACT)


@torch.no_grad()
def test_queries_asked_in_parts_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, parts = cell(read="all"), segments(2)
    _, state = memory(parts[0], memory.init_state(B), local, mask=None)
    whole = memory(parts[1], state, local, mask=None)[0]
    monkeypatch.setattr("memlm.memory.parts.nearest.SCORES", 1)
    torch.testing.assert_close(memory(parts[1], state, local, mask=None)[0], whole, **EXACT)


def test_no_gradient_reaches_the_modes() -> None:
    memory, (past, x) = cell(), segments(2)
    past = QKV(*(t.requires_grad_() for t in past))
    _, state = memory(past, memory.init_state(B), local, mask=None)
    assert not any(t.requires_grad for t in state)
    x = QKV(*(t.requires_grad_() for t in x))
    y, _ = memory(x, state, local, mask=None)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.square().sum(), x))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_modes": 0}, "num_modes=0 must be at least 1"),
        ({"merge_similarity": -1.5}, "merge_similarity=-1.5 must be at least -1"),
        ({"read": "some"}, "read='some' is unknown; use nearest or all"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
