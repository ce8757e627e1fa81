"""LM2 against its equations, one row, one token and one slot at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from memlm.memory import LM2Config
from memlm.memory.base import Dims
from memlm.memory.lm2 import LM2, LM2State
from memlm.modeling import MemLMForCausalLM
from tests.cases import SEGMENT, base_model, memory_model, randomise, tokens

D, ROWS, T, N = 6, 3, 5, 4
DIMS = Dims(D, D, 1, 2, 2, 3, T)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def cell(**options) -> LM2:
    memory = LM2(LM2.resolve(LM2Config(num_slots=N, **options), DIMS), DIMS).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def layer(x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """A causal stand-in for a decoder layer."""
    return x + 0.5 * x.cumsum(dim=1).sin()


def norm(x: torch.Tensor, known: torch.nn.LayerNorm) -> torch.Tensor:
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt() * known.weight + known.bias


def asked(attention, x: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    """What one vector finds in others, head by head."""
    size, found = attention.query.weight.shape[0] // attention.heads, []
    for head in range(attention.heads):
        rows = slice(head * size, (head + 1) * size)
        q = attention.query.weight[rows] @ x
        weights = torch.stack([q @ (attention.key.weight[rows] @ o) for o in others])
        weights = (weights / size**0.5).exp()
        values = [attention.value.weight[rows] @ o for o in others]
        found.append(sum(w * v for w, v in zip(weights / weights.sum(), values, strict=True)))
    return attention.output.weight @ torch.cat(found)


def by_hand(
    own: LM2, x: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: x (T, D), slots (N, D), mask (T,); the layer's outputs, and the next slots."""
    out = []
    for token, plain in zip(x, layer(x[None])[0], strict=True):
        e = asked(own.reading, norm(token, own.token_norm), list(slots))
        gate = torch.sigmoid(own.output_gate.weight @ e + own.output_gate.bias)
        out.append(plain + gate * e)
    written = [norm(y, own.written_norm) for y, real in zip(out, mask, strict=True) if real]
    pooled = sum((own.token_scale * y).clamp(min=0) for y in written) / len(written)
    new = []
    for m in slots:
        taken = own.tokens_in.weight @ pooled + own.slots_in.weight @ m.tanh() + own.slots_in.bias
        kept = own.tokens_kept.weight @ pooled + own.slots_kept.weight @ m.tanh()
        kept = kept + own.slots_kept.bias
        found = asked(own.writing, m, written).tanh()
        new.append(torch.sigmoid(taken) * found + torch.sigmoid(kept) * m)
    return torch.stack(out), torch.stack(new)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [{}, {"num_heads": 1, "head_dim": 5}], ids=["base's", "own"])
@torch.no_grad()
def test_equals_the_equations(heads: dict, padded: bool) -> None:
    own, state = cell(**heads), None
    for segment in range(3):
        x = random(ROWS, T, D, seed=segment)
        mask = torch.ones(ROWS, T, dtype=torch.bool)
        if padded:
            mask = random(ROWS, T, seed=10 + segment) > -0.3
            mask[:, segment] = True
        state = own.init_state(ROWS) if state is None else state
        y, new = own(x, state, layer, mask=mask if padded else None)
        for row in range(ROWS):
            outputs, slots = by_hand(own, x[row], state.slots[row], mask[row])
            torch.testing.assert_close(y[row], outputs, **CLOSE)
            torch.testing.assert_close(new.slots[row], slots, **CLOSE)
        state = new


@torch.no_grad()
def test_no_token_is_told_of_a_later_one_of_its_segment() -> None:
    """What the published code does not keep: there the slots are written before they are read."""
    own, x = cell(), random(1, T, D)
    state = own.init_state(1)
    other = x.clone()
    other[:, -1] += 1
    before, after = (own(one, state, layer, mask=None) for one in (x, other))
    assert torch.equal(before[0][:, :-1], after[0][:, :-1])
    assert not torch.equal(before[1].slots, after[1].slots)


@torch.no_grad()
def test_slots_start_as_different_rows_of_the_identity_and_stay_so_across_layers() -> None:
    config = LM2Config(num_slots=N)
    model = MemLMForCausalLM.from_base(base_model("llama"), memory=config, segment_length=SEGMENT)
    state = model.init_state(2)
    for name in ("lm2.0.slots", "lm2.1.slots"):
        assert torch.equal(state[name][0], torch.eye(N, 32, dtype=torch.float64))
    model = memory_model("llama", config)
    state = model(tokens(2, SEGMENT)).memory_state
    assert not torch.allclose(state["lm2.0.slots"], state["lm2.1.slots"])


@torch.no_grad()
def test_gates_far_open_and_shut_keep_or_replace_the_slots() -> None:
    own, x = cell(), random(2, T, D)
    state = own.init_state(2)
    for gate in (own.tokens_in, own.tokens_kept, own.slots_in, own.slots_kept):
        gate.weight.zero_()
    own.slots_in.bias.fill_(-1e3)
    own.slots_kept.bias.fill_(1e3)
    assert torch.equal(own(x, state, layer, mask=None)[1].slots, state.slots)
    own.slots_in.bias.fill_(1e3)
    own.slots_kept.bias.fill_(-1e3)
    replaced = own(x, state, layer, mask=None)[1].slots
    far = own(x, LM2State(state.slots + 1e-9), layer, mask=None)[1].slots
    assert replaced.abs().max() < 1 and torch.allclose(replaced, far, atol=1e-7)


@pytest.mark.parametrize("slots", [0, D + 1])
def test_refuses_slots_that_would_not_differ(slots: int) -> None:
    with pytest.raises(ValueError, match=f"num_slots={slots} must be from 1 to hidden_size={D}"):
        LM2.resolve(LM2Config(num_slots=slots), DIMS)


def test_the_options_decide_how_gates_and_reading_start() -> None:
    options = {"input_bias": -2.0, "forget_bias": 6.0, "output_std": 0.1}
    memory = LM2(LM2.resolve(LM2Config(num_slots=N, **options), DIMS), DIMS)
    memory.reset_parameters(1.0)
    assert (memory.slots_in.bias == -2).all() and (memory.slots_kept.bias == 6).all()
    assert 0.03 < memory.reading.output.weight.std() < 0.3
    plain = LM2(LM2.resolve(LM2Config(num_slots=N), DIMS), DIMS)
    plain.reset_parameters(1.0)
    assert not plain.reading.output.weight.any() and plain.writing.output.weight.any()
