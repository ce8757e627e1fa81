"""TTT-Linear against its definition: one row, head and token at a time, gradients by autograd."""

from __future__ import annotations

import cmath

import pytest
import torch
import torch.nn.functional as F

from memlm.memory import TTTLinearConfig
from memlm.memory.base import Dims
from memlm.memory.parts.linear_model import Norm, norm_slope
from memlm.memory.ttt_linear import TTTLinear
from tests.cases import randomise

D, T, HEADS, SIZE, C, ROWS = 6, 5, 2, 4, 3, 2
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def cell(**options) -> TTTLinear:
    dims = Dims(D, D, 1, 2, 2, 3, T)
    given = {"num_heads": HEADS, "head_dim": SIZE, "mini_batch": C, "conv_size": 3, **options}
    torch.manual_seed(0)
    memory = TTTLinear(TTTLinear.resolve(TTTLinearConfig(**given), dims), dims)
    memory.double().eval().reset_parameters(1.0)
    randomise(memory)
    return memory


def texts(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Segments (B, T, D) with masks that have holes: no row's mini-batches end with its segments."""
    g = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(ROWS, T, D, generator=g, dtype=torch.float64),
            torch.rand(ROWS, T, generator=g) < 0.7,
        )
        for _ in range(count)
    ]


def turned(x: torch.Tensor, place: int) -> torch.Tensor:
    """Pairs of channels as complex numbers, turned by the place."""
    half = len(x) // 2
    angles = [cmath.exp(1j * place * 10_000 ** (-i / half)) for i in range(half)]
    pairs = torch.complex(x[:half], x[half:]) * torch.tensor(angles, dtype=torch.complex128)
    return torch.cat([pairs.real, pairs.imag])


class Row:
    """One row: W and b per head where its mini-batch began, and the gradients of the tokens since."""

    def __init__(self, memory: TTTLinear) -> None:
        self.m = memory
        self.models = [(memory.initial_weight[h], memory.initial_bias[h, 0]) for h in range(HEADS)]
        self.open: list[list[tuple]] = [[] for _ in range(HEADS)]
        self.inputs: list[torch.Tensor] = []

    def norm(self, z: torch.Tensor, h: int) -> torch.Tensor:
        z = (z - z.mean()) / (z.var(unbiased=False) + 1e-6).sqrt()
        return z * self.m.norm_weight[h, 0] + self.m.norm_bias[h, 0]

    def queries_and_keys(self, x: torch.Tensor) -> torch.Tensor:
        z, size = self.m.qk_proj(x), self.m.config.conv_size
        if not size:
            return z.view(2, HEADS, SIZE)
        self.inputs.append(z)
        past = [torch.zeros_like(z)] * size + self.inputs
        taps = self.m.kernel[:, 0].view(2, -1, size)
        mixed = sum(taps[:, :, -1 - back] * past[-1 - back] for back in range(size))
        return (mixed + self.m.conv_bias.view(2, -1)).view(2, HEADS, SIZE)

    def token(self, x: torch.Tensor) -> torch.Tensor:
        (qs, ks), vs = self.queries_and_keys(x), self.m.v_proj(x).view(HEADS, SIZE)
        rates = torch.sigmoid(self.m.rate_proj(x)) * self.m.config.base_rate / SIZE
        said = []
        for h in range(HEADS):
            place = len(self.open[h])
            (weight, bias), q, k = self.models[h], turned(qs[h], place), turned(ks[h], place)
            loss = 0.5 * (k + self.norm(k @ weight + bias, h) - vs[h]).square().sum()
            self.open[h].append(
                [
                    rates[h] * one
                    for one in torch.autograd.grad(loss, (weight, bias), create_graph=True)
                ]
            )
            c = (1 / (place + 1) + self.m.place_rates[place]).clamp(min=0)
            now = [
                one - c * sum(step[i] for step in self.open[h])
                for i, one in enumerate((weight, bias))
            ]
            said.append(q + self.norm(q @ now[0] + now[1], h))
            if place + 1 == C:
                self.models[h], self.open[h] = tuple(now), []
        y = F.layer_norm(
            torch.cat(said), (HEADS * SIZE,), self.m.o_norm.weight, self.m.o_norm.bias, 1e-6
        )
        if self.m.g_proj is not None:
            y = y * F.gelu(self.m.g_proj(x), approximate="tanh")
        return self.m.o_proj(y)


@pytest.mark.parametrize(
    "options",
    [{}, {"conv_size": 0, "gated": False}, {"mini_batch": 1, "base_rate": 0.3}, {"mini_batch": 16}],
    ids=str,
)
def test_equals_steps_down_autograd_s_gradient(
    options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "C", options.get("mini_batch", C))
    memory = cell(**{"mini_batch": C, **options})
    with torch.no_grad():
        # The second place of a mini-batch sees no step.
        memory.place_rates[1:2] -= 3.0
    rows, state = [Row(memory) for _ in range(ROWS)], memory.init_state(ROWS)
    found, expected = torch.zeros(()), torch.zeros(())
    for x, mask in texts(3):
        y, state = memory(x, state, lambda x: 2 * x, mask=mask)
        for index, row in enumerate(rows):
            for t in mask[index].nonzero().flatten():
                answer = 2 * x[index, t] + row.token(x[index, t])
                torch.testing.assert_close(y[index, t], answer, **EXACT)
                found, expected = found + y[index, t].sin().sum(), expected + answer.sin().sum()
            assert state.filled[index] == len(row.open[0])
            for h in range(HEADS):
                torch.testing.assert_close(state.model.weight[index, h], row.models[h][0], **EXACT)
                torch.testing.assert_close(state.model.bias[index, h, 0], row.models[h][1], **EXACT)
                steps = sum(step[0] for step in row.open[h]) + torch.zeros(SIZE, SIZE)
                torch.testing.assert_close(state.steps.weight[index, h], steps.double(), **EXACT)
    parameters = list(memory.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters, allow_unused=True),
        strict=True,
    ):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("cuts", [[1] * 10, [3, 3, 4], [1, 8, 1]], ids=str)
@torch.no_grad()
def test_segments_may_end_anywhere_in_a_mini_batch(cuts: list[int]) -> None:
    memory, g = cell(), torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, 10, D, generator=g, dtype=torch.float64)
    whole, last = memory(x, memory.init_state(ROWS), torch.zeros_like, mask=None)
    state, parts = memory.init_state(ROWS), []
    for part in x.split(cuts, dim=1):
        y, state = memory(part, state, torch.zeros_like, mask=None)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)
    for a, b in zip((*state.model, *state.steps), (*last.model, *last.steps), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    assert torch.equal(state.filled, last.filled) and last.filled.tolist() == [10 % C] * ROWS


def test_the_slope_is_autograd_s() -> None:
    g = torch.Generator().manual_seed(0)
    z, target = (torch.randn(1, 2, 3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    norm = Norm(*(torch.randn(2, 1, 4, generator=g, dtype=torch.float64) for _ in range(2)))
    z.requires_grad_()
    said = F.layer_norm(z, (4,), eps=1e-6) * norm.weight + norm.bias
    (slope,) = torch.autograd.grad(0.5 * (said - target).square().sum(), z)
    pull, square = (norm.bias - target) * norm.weight, norm.weight.square()
    found = norm_slope(z, pull, square)
    torch.testing.assert_close(found, slope, **EXACT)


@torch.no_grad()
def test_tokens_without_a_rate_leave_the_model_as_it_was() -> None:
    memory = cell()
    (x, _), state = texts(1)[0], memory.init_state(ROWS)
    memory.rate_proj.weight.zero_()
    memory.rate_proj.bias.fill_(-1e4)
    _, after = memory(x, state, lambda x: x, mask=None)
    assert all(torch.equal(a, b) for a, b in zip(after.model, state.model, strict=True))
    assert not after.steps.weight.any() and after.filled.tolist() == [T % C] * ROWS


@torch.no_grad()
def test_rates_start_where_the_config_says() -> None:
    memory = cell(initial_rate=0.1)
    memory.reset_parameters(1.0)
    rate = torch.sigmoid(memory.rate_proj(torch.zeros(D, dtype=torch.float64)))
    torch.testing.assert_close(rate, torch.full_like(rate, 0.1), rtol=1e-6, atol=0)


def test_sizes_and_the_paper_s_settings() -> None:
    config = TTTLinearConfig.paper()
    assert (config.mini_batch, config.conv_size, config.gated, config.base_rate) == (16, 4, True, 1)
    assert round(config.conv_std, 3) == 0.289
    assert cell(head_dim=None, num_heads=3).config.head_dim == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head_dim": 3}, "head_dim=3 must be even"),
        ({"head_dim": None, "num_heads": 4}, "num_heads=4 does not divide hidden_size=6"),
        ({"mini_batch": 0}, "mini_batch=0 must be at least 1"),
        ({"base_rate": 0.0}, "base_rate=0.0 must be above 0"),
        ({"initial_rate": 1.0}, "initial_rate=1.0 must lie between 0 and 1"),
        ({"conv_size": -1}, "conv_size=-1 must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
