"""Landmark attention against lists of blocks, query by query."""

from __future__ import annotations

import math

import pytest
import torch

from memlm.memory import QKV, LandmarkConfig, landmark
from memlm.memory.landmark import Landmark
from memlm.memory.parts.cache import push_blocks
from tests.memory.heads import EXACT, SCALE, B, D, G, H, T, dims, local, masks, segments, softmax

Token = tuple[torch.Tensor, torch.Tensor]


def cell(groups: int = G, **options) -> Landmark:
    config = LandmarkConfig(**{"num_blocks": 4, "block_length": 3, "top_k": 2, **options})
    return Landmark(Landmark.resolve(config, dims(groups)), dims(groups)).double()


def blocks_of(store: list[Token], memory: Landmark) -> list[list[Token]]:
    """The document in blocks, of which the last may be open; only the last `num_blocks` are kept."""
    size = memory.config.block_length
    blocks = [store[i : i + size] for i in range(0, len(store), size)]
    return blocks[-memory.config.num_blocks :]


def expected(memory: Landmark, x: QKV, store: list[Token], row: int, head: int, t: int):
    """One query: the segment's tokens and the landmarks it picks in one softmax, then the blocks' own."""
    group = head // (H // x.k.shape[1])
    q = SCALE * x.q[row, head, t]
    entries = [(float(q @ x.k[row, group, i]), x.v[row, group, i]) for i in range(t + 1)]
    found = []
    for block in blocks_of(store, memory):
        mean = sum(key for key, _ in block) / len(block)
        scores = [float(q @ key) for key, _ in block]
        read = sum(w * value for w, (_, value) in zip(softmax(scores), block, strict=True))
        found.append((float(q @ mean), scores, read))
    found = sorted(found, key=lambda one: -one[0])[: memory.config.top_k]
    for score, scores, read in found:
        whole = math.log(sum(math.exp(s) for s in scores))
        entries.append((score if memory.config.grouped else whole, read))
    weights = softmax([score for score, _ in entries])
    return sum(w * value for w, (_, value) in zip(weights, entries, strict=True))


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    ("top_k", "groups", "numbers", "copied"),
    [(4, G, 2**24, 24), (2, 1, 1, 0), (2, H, 150, 24), (1, G, 2**24, 24), (1, G, 2**24, 0)],
    ids=str,
)
@torch.no_grad()
def test_equals_the_grouped_softmax_query_by_query(
    grouped: bool, top_k: int, groups: int, numbers: int, copied: int, monkeypatch
) -> None:
    """With top_k = num_blocks nothing is left out. copied=0: what is read is copied for each query."""
    monkeypatch.setattr(landmark, "NUMBERS", numbers)
    monkeypatch.setattr(landmark, "COPIED", copied)
    memory = cell(groups, top_k=top_k, grouped=grouped)
    state = memory.init_state(B)
    store: list[list[list[Token]]] = [[[] for _ in range(groups)] for _ in range(B)]
    for x, mask in zip(segments(6, groups), masks(6), strict=True):
        y, state = memory(x, state, local, mask=mask)
        for row in range(B):
            for head in range(H):
                past = store[row][head // (H // groups)]
                for t in range(T):
                    oracle = expected(memory, x, past, row, head, t)
                    torch.testing.assert_close(y[row, head, t], oracle, **EXACT)
            for group in range(groups):
                store[row][group] += [
                    (x.k[row, group, t], x.v[row, group, t]) for t in range(T) if mask[row, t]
                ]
    for row in range(B):
        kept = [token for block in blocks_of(store[row][0], memory) for token in block]
        assert int(state.length[row]) == len(kept)
        keys = torch.stack([key for key, _ in kept])
        assert torch.equal(state.keys[row, 0, : len(kept)], keys)
        assert not state.keys[row, :, len(kept) :].any()


@torch.no_grad()
def test_ungrouped_with_every_block_read_is_dense_attention() -> None:
    memory, parts = cell(num_blocks=7, top_k=7, grouped=False), segments(4)
    state = memory.init_state(B)
    for x in parts:
        y, state = memory(x, state, local, mask=None)
    whole = QKV(parts[-1].q, torch.cat([x.k for x in parts], 2), torch.cat([x.v for x in parts], 2))
    torch.testing.assert_close(y, local(whole), **EXACT)


@pytest.mark.parametrize("copied", [0, 24])
def test_gradients_reach_what_was_stored_and_are_those_of_dense_attention(
    copied: int, monkeypatch
) -> None:
    monkeypatch.setattr(landmark, "COPIED", copied)
    memory, (past, x) = cell(num_blocks=2, top_k=2, grouped=False), segments(2)
    past = QKV(past.q, past.k.requires_grad_(), past.v.requires_grad_())
    _, state = memory(past, memory.init_state(B), local, mask=None)
    y, _ = memory(x, state, local, mask=None)
    found = torch.autograd.grad(y.square().sum(), past[1:])
    whole = QKV(x.q, torch.cat([past.k, x.k], 2), torch.cat([past.v, x.v], 2))
    dense = torch.autograd.grad(local(whole).square().sum(), past[1:])
    torch.testing.assert_close(found, dense, **EXACT)


@pytest.mark.parametrize("count", [1, 3, 11, 12, 13, 40])
@pytest.mark.parametrize("block", [1, 3, 12])
def test_blocks_leave_whole_however_much_comes_at_once(block: int, count: int) -> None:
    """Twelve places, `count` new entries by a mask with holes, after seven."""
    generator = torch.Generator().manual_seed(count)
    old = torch.zeros(B, G, 12, D)
    old[:, :, :7] = torch.randn(B, G, 7, D, generator=generator)
    new = torch.randn(B, G, count, D, generator=generator)
    mask = torch.rand(B, count, generator=generator) < 0.8
    ((kept,), length) = push_blocks((old,), torch.full((B,), 7), (new,), mask, block)
    for row in range(B):
        entries = [*old[row, :, :7].unbind(1), *new[row][:, mask[row]].unbind(1)]
        while len(entries) > 12:
            entries = entries[block:]
        assert int(length[row]) == len(entries)
        assert torch.equal(kept[row, :, : len(entries)], torch.stack(entries, 1))
        assert not kept[row, :, len(entries) :].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_blocks": 0}, "num_blocks=0 must be at least 1"),
        ({"block_length": 0}, "block_length=0 must be at least 1"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 5}, "top_k=5 blocks cannot be read of num_blocks=4"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
