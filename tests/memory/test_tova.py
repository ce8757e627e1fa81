"""TOVA against a list of tokens: attention one query at a time, and a ranking by the last one's weights."""

from __future__ import annotations

import pytest
import torch

from memlm import MemLMForCausalLM
from memlm.memory import QKV, TOVAConfig
from memlm.memory.tova import TOVA
from tests.cases import SEGMENT, base_model, tokens
from tests.memory.heads import EXACT, SCALE, B, G, H, T, dims, local, masks, segments, softmax

Token = tuple[torch.Tensor, torch.Tensor]


def cell(groups: int = G, **options) -> TOVA:
    config = TOVAConfig(**{"memory_length": 6, **options})
    return TOVA(TOVA.resolve(config, dims(groups)), dims(groups)).double()


def weights(q: torch.Tensor, keys: list[torch.Tensor], head: int, groups: int) -> list[float]:
    group = head // (H // groups)
    return softmax([float(SCALE * q[head] @ key[group]) for key in keys])


@pytest.mark.parametrize(("groups", "length"), [(1, 6), (G, 6), (H, 6), (G, 1), (G, 30)])
@torch.no_grad()
def test_equals_attention_and_ranking_token_by_token(groups: int, length: int) -> None:
    memory = cell(groups, memory_length=length)
    state = memory.init_state(B)
    store: list[list[Token]] = [[] for _ in range(B)]
    left = False
    for x, mask in zip(segments(6, groups), masks(6), strict=True):
        # Where a segment has holes, its padding is the stage's business: it asks for nothing here.
        y, state = memory(x, state, stage(mask), mask=mask)
        for row in range(B):
            q = x.q[row].transpose(0, 1)
            here = [(x.k[row, :, t], x.v[row, :, t]) for t in range(T) if mask[row, t]]
            real = mask[row].nonzero().flatten().tolist()
            for count, t in enumerate(real, 1):
                seen = store[row] + here[:count]
                for head in range(H):
                    share = weights(q[t], [key for key, _ in seen], head, groups)
                    read = sum(
                        w * value[head // (H // groups)]
                        for w, (_, value) in zip(share, seen, strict=True)
                    )
                    torch.testing.assert_close(y[row, head, t], read, **EXACT)
            seen = store[row] + here
            if real:
                by_head = [
                    weights(q[real[-1]], [key for key, _ in seen], head, groups)
                    for head in range(H)
                ]
                ranks = sorted(range(len(seen)), key=lambda i: -sum(share[i] for share in by_head))
                kept = sorted(ranks[:length])
                left |= kept != list(range(len(seen)))[-length:]
                store[row] = [seen[i] for i in kept]
            held = len(store[row])
            assert int(state.length[row]) == held
            at = slice(length - held, None)
            assert torch.equal(state.keys[row, :, at], torch.stack([k for k, _ in store[row]], 1))
            assert torch.equal(state.values[row, :, at], torch.stack([v for _, v in store[row]], 1))
            assert not state.keys[row, :, : length - held].any()
    # It is not the last tokens that stay.
    assert left == (length < 30)


@pytest.mark.parametrize("length", [5, 7, 30])
@torch.no_grad()
def test_a_weight_of_zero_is_more_than_what_is_not_there(length: int) -> None:
    """Where there is room, even a token that nobody attends to stays."""
    memory, x = cell(memory_length=length), segments(1)[0]
    x = QKV(1e4 * x.q, x.k, x.v)
    mask = torch.tensor([[True] * T, [True, False, True, True, True]])
    attended = local(x, parts=True)
    assert (attended.scores.softmax(-1)[:, :, -1] == 0).any(-1).all()
    _, state = memory(x, memory.init_state(B), stage(mask), mask=mask)
    assert state.length.tolist() == [5, 4]
    assert torch.equal(state.keys[0, :, -5:], x.k[0])
    assert torch.equal(state.keys[1, :, -4:], x.k[1][:, mask[1]])


def stage(mask: torch.Tensor):
    """`local`, in which padding is not seen."""

    def inner(x: QKV, mask: torch.Tensor, parts: bool = False):
        attended = local(x, parts=True)
        ahead = ~mask[:, None, None]
        scores = attended.scores.masked_fill(ahead, torch.finfo(torch.float64).min)
        v = x.v.repeat_interleave(H // x.v.shape[1], 1)
        y = scores.softmax(-1) @ v
        return attended._replace(output=y, scores=scores) if parts else y

    return inner


@torch.no_grad()
def test_on_a_model_the_weights_are_those_of_its_attention() -> None:
    """With rotary angles: what stays in the first layer is what eager attention says it attends to."""
    base, ids = base_model("llama", attn_implementation="eager"), tokens(1, SEGMENT)
    found = base(ids, output_attentions=True).attentions[0][0, :, -1].mean(0)
    kept = found.topk(3).indices.sort().values
    model = MemLMForCausalLM.from_base(
        base, memory=TOVAConfig(memory_length=3), segment_length=SEGMENT
    )
    cell, seen = model.memory.attached["tova"].cells["0"], []
    inside = cell.forward
    cell.forward = lambda x, *args, **kwargs: seen.append(x) or inside(x, *args, **kwargs)
    state = model(ids).memory_state
    assert kept.tolist() != [3, 4, 5]
    torch.testing.assert_close(state["tova.0.keys"][0], seen[0].k[0, :, kept], **EXACT)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="memory_length=0 is no memory"):
        cell(memory_length=0)
