"""Memformer against its equations, one row, one token and one slot at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from memlm.memory import MemformerConfig
from memlm.memory.base import Dims
from memlm.memory.memformer import Memformer, MemformerState
from tests.cases import randomise

D, ROWS, T, N = 6, 3, 5, 4
DIMS = Dims(D, D, 1, 2, 2, 3, T)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def cell(**options) -> Memformer:
    config = MemformerConfig(**{"num_slots": N, **options})
    memory = Memformer(Memformer.resolve(config, DIMS), DIMS).double()
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


def parts(own: Memformer, x: torch.Tensor) -> list[torch.Tensor]:
    return list(x.split(D // own.heads))


def softmax(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    powers = [score.exp() for score in scores]
    return [power / sum(powers) for power in powers]


def asked(own: Memformer, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    read = own.reading
    queries = parts(own, read.query.weight @ x)
    keys = [parts(own, read.key.weight @ m) for m in slots]
    values = [parts(own, read.value.weight @ m) for m in slots]
    found = []
    for head, q in enumerate(queries):
        weights = softmax([q @ k[head] / len(q) ** 0.5 for k in keys])
        found.append(sum(w * v[head] for w, v in zip(weights, values, strict=True)))
    return read.output.weight @ torch.cat(found)


def by_hand(
    own: Memformer, x: torch.Tensor, slots: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One row: x (T, D), slots (N, D), mask (T,); the layer's outputs, and the next slots."""
    y = layer(torch.stack([t + asked(own, norm(t, own.token_norm), slots) for t in x])[None])[0]
    tokens = [norm(t, own.written_norm) for t, real in zip(y, mask, strict=True) if real]
    new = []
    for m, bias in zip(slots, own.bias, strict=True):
        queries, itself = parts(own, own.query.weight @ m), parts(own, own.key.weight @ m)
        keys = [parts(own, own.key.weight @ t) for t in tokens]
        values = [parts(own, own.value.weight @ t) for t in tokens]
        found = []
        for head, q in enumerate(queries):
            scores = [q @ itself[head], *(q @ k[head] for k in keys)]
            weights = softmax([s / len(q) ** 0.5 / own.temperature for s in scores])
            own_value = parts(own, m)[head]
            others = sum(w * v[head] for w, v in zip(weights[1:], values, strict=True))
            found.append(weights[0] * own_value + others)
        moved = torch.cat(found) + bias
        new.append(moved / moved.square().sum().sqrt() * D**0.5)
    return y, torch.stack(new)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_heads": 3, "temperature": 2.0}], ids=["base's", "own"]
)
@torch.no_grad()
def test_equals_the_equations(options: dict, padded: bool) -> None:
    own = cell(**options)
    state = own.init_state(ROWS)
    start = own.bias / own.bias.square().sum(dim=1, keepdim=True).sqrt() * D**0.5
    for segment in range(3):
        x = random(ROWS, T, D, seed=segment)
        mask = torch.ones(ROWS, T, dtype=torch.bool)
        if padded:
            mask = random(ROWS, T, seed=10 + segment) > -0.3
            mask[:, segment] = True
        y, new = own(x, state, layer, mask=mask if padded else None)
        for row in range(ROWS):
            before = state.slots[row] if segment else start
            outputs, slots = by_hand(own, x[row], before, mask[row])
            torch.testing.assert_close(y[row], outputs, **CLOSE)
            torch.testing.assert_close(new.slots[row], slots, **CLOSE)
        state = new


@torch.no_grad()
def test_a_slot_that_attends_to_itself_alone_moves_by_its_bias_alone() -> None:
    own, x = cell(temperature=1e-3), random(2, T, D)
    own.written_norm.weight.zero_()
    own.written_norm.bias.zero_()
    own.key.weight.copy_(own.query.weight)
    state = MemformerState(own.normalised(random(2, N, D, seed=3)))
    new = own(x, state, layer, mask=None)[1].slots
    torch.testing.assert_close(new, own.normalised(state.slots + own.bias), **CLOSE)
    own.bias.zero_()
    torch.testing.assert_close(own(x, state, layer, mask=None)[1].slots, state.slots, **CLOSE)


@torch.no_grad()
def test_a_low_temperature_takes_from_one_token_and_a_high_one_from_all() -> None:
    x, spread = random(1, T, D), []
    for temperature in (1e-4, 100.0):
        own = cell(temperature=temperature)
        state = own.init_state(1)
        plain = own.write(x, state, None).slots
        moved = []
        for token in range(T):
            mask = torch.ones(1, T, dtype=torch.bool)
            mask[0, token] = False
            moved.append((own.write(x, state, mask).slots - plain).abs().amax(dim=(0, 2)) > 1e-6)
        spread.append(torch.stack(moved).sum(dim=0))
    # Each slot notices at most one missing token per head, or each of them.
    assert (spread[0] <= 2).all() and (spread[1] == T).all()


@torch.no_grad()
def test_the_stated_half_life_of_slots_that_take_nothing_in() -> None:
    size = 512
    dims = Dims(size, size, 1, 8, 8, 64, T)
    own = Memformer(Memformer.resolve(MemformerConfig(), dims), dims).double()
    own.reset_parameters(1.0)
    slots = start = own.normalised(random(16, size))
    shares = []
    for _ in range(20):
        slots = own.normalised(slots + own.bias)
        shares.append(float((slots * start).sum(dim=1).mean() / size))
    assert shares[4] > 0.8 and 0.6 < shares[9] < 0.8 and shares[19] < 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots=0 must be at least 1"),
        ({"num_heads": 4}, "num_heads=4 does not divide hidden_size=6"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"bias_std": 0.0}, "bias_std=0.0 must be above 0"),
    ],
)
def test_refuses_what_cannot_work(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Memformer.resolve(MemformerConfig(**options), DIMS)
