"""Block-Recurrent against its equations, one vector, one head and one pair at a time, in float64."""

from __future__ import annotations

import pytest
import torch

from memlm.memory import BlockRecurrentConfig
from memlm.memory.base import Dims
from memlm.memory.block_recurrent import BlockRecurrent
from tests.cases import randomise

D, T, HEADS, SIZE, STATES, ROWS = 6, 5, 2, 4, 3, 2
EXACT = {"rtol": 0.0, "atol": 1e-9}
BOTH = pytest.mark.parametrize("gate", ["fixed", "lstm"])


def cell(segment_length: int = T, **options) -> BlockRecurrent:
    dims = Dims(D, D, 2, 2, 2, 3, segment_length)
    given = {"num_states": STATES, "num_heads": HEADS, "head_dim": SIZE, **options}
    config = BlockRecurrent.resolve(BlockRecurrentConfig(**given), dims)
    torch.manual_seed(3)
    memory = BlockRecurrent(config, dims)
    memory.double().eval().reset_parameters(1.0)
    randomise(memory)
    with torch.no_grad():
        # Only the size of a scale counts.
        memory.scales[:, 1].neg_()
    return memory


def texts(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Segments (B, T, D) with masks that have holes, and no row without a token."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        mask = torch.rand(ROWS, T, generator=g) < 0.6
        mask[:, 2] = True
        found.append((torch.randn(ROWS, T, D, generator=g, dtype=torch.float64), mask))
    return found


def length_one(x: torch.Tensor) -> torch.Tensor:
    return x / (x @ x + 1e-6).sqrt()


def look(q: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], scale: torch.Tensor):
    """One query of one head over keys and values."""
    scores = torch.stack([scale.abs() * (length_one(q) @ length_one(k)) for k, _ in pairs])
    weights = scores.exp() / scores.exp().sum()
    return sum(w * v for w, (_, v) in zip(weights, pairs, strict=True))


def half(linear, x: torch.Tensor, which: int, head: int) -> torch.Tensor:
    """A head of the first or second half of a projection."""
    return linear(x).view(2, HEADS, SIZE)[which, head]


def segment(memory: BlockRecurrent, xs: list[torch.Tensor], states: list[torch.Tensor]):
    """What the tokens of one row are told, and the row's next states."""
    seen = [
        s / (s.square().mean() + 1e-6).sqrt() * memory.norm + memory.ids[i]
        for i, s in enumerate(states)
    ]
    entry = memory.state_entry
    told = []
    for x in xs:
        parts = []
        for h in range(HEADS):
            pairs = [(half(entry, s, 0, h), half(entry, s, 1, h)) for s in seen]
            query = memory.token_query(x).view(HEADS, SIZE)[h]
            parts.append(look(query, pairs, memory.scales[0, h]))
        told.append(memory.o_proj(torch.cat(parts)))
    new = []
    for s, old in zip(seen, states, strict=True):
        of_states, of_tokens = [], []
        for h in range(HEADS):
            pairs = [(half(entry, o, 0, h), half(entry, o, 1, h)) for o in seen]
            of_states.append(look(half(memory.state_query, s, 0, h), pairs, memory.scales[1, h]))
            entries = memory.token_entry
            pairs = [(half(entries, x, 0, h), half(entries, x, 1, h)) for x in xs]
            of_tokens.append(look(half(memory.state_query, s, 1, h), pairs, memory.scales[2, h]))
        found = torch.cat(of_states + of_tokens)
        candidate = memory.candidate.weight @ found
        if memory.config.gate == "fixed":
            keep = 1 / (1 + (-memory.gate_bias).exp())
            new.append(keep * old + (1 - keep) * candidate)
        else:
            logits = memory.gates.weight @ found + memory.gates.bias
            keep, enter = 1 / (1 + (-logits[:D]).exp()), 1 / (1 + (-logits[D:]).exp())
            new.append(keep * old + enter * candidate)
    return told, new


@BOTH
def test_equals_the_equations_and_their_gradients(gate: str) -> None:
    memory = cell(gate=gate)
    state = memory.init_state(ROWS)
    rows = [list(memory.initial) for _ in range(ROWS)]
    found, expected = torch.zeros(()), torch.zeros(())
    for x, mask in texts(3):
        y, state = memory(x, state, lambda x: 2 * x, mask=mask)
        for row in range(ROWS):
            at = mask[row].nonzero().flatten()
            told, rows[row] = segment(memory, list(x[row, at]), rows[row])
            for t, answer in zip(at, told, strict=True):
                torch.testing.assert_close(y[row, t], 2 * x[row, t] + answer, **EXACT)
                found = found + y[row, t].sin().sum()
                expected = expected + (2 * x[row, t] + answer).sin().sum()
            torch.testing.assert_close(state.vectors[row], torch.stack(rows[row]), **EXACT)
    parameters = list(memory.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@torch.no_grad()
def test_a_gate_that_keeps_leaves_the_states_as_they_were() -> None:
    memory = cell()
    memory.gate_bias.fill_(60.0)
    state = memory.init_state(ROWS)
    (x, mask), _ = texts(2)
    _, after = memory(x, state, lambda x: x, mask=mask)
    assert torch.equal(after.vectors, state.vectors)
    memory.gate_bias.fill_(-60.0)
    _, after = memory(x, state, lambda x: x, mask=mask)
    assert (after.vectors - state.vectors).abs().min() > 1e-6


@BOTH
@torch.no_grad()
def test_gates_start_where_the_config_says(gate: str) -> None:
    memory = BlockRecurrent(cell(gate=gate, initial_gate=5.0).config, Dims(D, D, 2, 2, 2, 3, T))
    memory.double().reset_parameters(1.0)
    if gate == "fixed":
        assert (memory.gate_bias - 5).abs().max() < 0.6
    else:
        keep, enter = memory.gates.bias.chunk(2)
        assert (keep - 6).abs().max() < 0.6 and (enter + 6).abs().max() < 0.6


def test_a_row_without_a_token_has_finite_gradients() -> None:
    memory = cell()
    x = torch.randn(ROWS, T, D, dtype=torch.float64)
    mask = torch.ones(ROWS, T, dtype=torch.bool)
    mask[1] = False
    y, state = memory(x, memory.init_state(ROWS), lambda x: x, mask=mask)
    (y[0].sum() + state.vectors[0].sum()).backward()
    assert all(p.grad.isfinite().all() for p in memory.parameters())


def test_sizes_that_are_left_open() -> None:
    assert cell(num_states=None).config.num_states == T
    assert cell(num_states=None, segment_length=4096).config.num_states == 512
    config = cell(num_heads=None, head_dim=None).config
    assert (config.num_heads, config.head_dim) == (2, 3)
    assert BlockRecurrentConfig.paper().num_states == 512


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gate": "full"}, "gate='full' is unknown; use 'fixed' or 'lstm'"),
        ({"num_states": 0}, "num_states=0 must be at least 1"),
        ({"num_heads": 4, "head_dim": None}, "num_heads=4 does not divide hidden_size=6"),
        ({"initial_scale": 0.0}, "initial_scale=0.0 must be above 0"),
        ({"output_std": -1.0}, "output_std=-1.0 must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
