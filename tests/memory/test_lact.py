"""LaCT against its definition: one row, head and token at a time, the gradient by autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm.memory import LaCTConfig
from memlm.memory.base import Dims
from memlm.memory.lact import LaCT, ascent
from memlm.memory.parts.gates import STRETCH
from memlm.memory.parts.orthogonal import LACT, orthogonal
from tests.cases import randomise

EXACT = {"rtol": 0.0, "atol": 1e-10}
D, T, ROWS, HEADS = 6, 5, 2, 2


def cell(**options) -> LaCT:
    torch.manual_seed(0)
    dims = Dims(D, D, 1, 2, 2, 3, T)
    memory = LaCT(LaCT.resolve(LaCTConfig(**{"num_heads": HEADS, **options}), dims), dims)
    memory.double().eval().reset_parameters(1.0)
    randomise(memory)
    return memory


def texts(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Segments (B, T, D) with masks that have holes."""
    g = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(ROWS, T, D, generator=g, dtype=torch.float64),
            torch.rand(ROWS, T, generator=g) < 0.7,
        )
        for _ in range(count)
    ]


def fast(x: torch.Tensor, w: list[torch.Tensor]) -> torch.Tensor:
    """The fast MLP on one vector."""
    return (F.silu(x @ w[0]) * (x @ w[2])) @ w[1]


def at_start_norm(weight: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Column by column: each output's weights at the norm they started with."""
    columns = [
        weight[:, j] / (weight[:, j].norm() + 1e-5) * start[:, j].norm()
        for j in range(weight.shape[1])
    ]
    return torch.stack(columns, dim=1)


def muon(x: torch.Tensor) -> torch.Tensor:
    """The Newton-Schulz steps on singular values: U p(p(...(S))) V."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / (x.norm() + 1e-7)
    for a, b, c in LACT:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


class Row:
    """One row: per head, the three matrices and their momentum, and what the paper does to them."""

    def __init__(self, memory: LaCT) -> None:
        self.m, self.c = memory, memory.config
        self.weights = [[w[head] for w in memory.initial] for head in range(HEADS)]
        self.momentum = [
            [torch.zeros_like(w[head]) for w in memory.initial] for head in range(HEADS)
        ]

    def vectors(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.m.qkv_proj(x)).view(3, HEADS, self.m.size)

    def used(self, head: int) -> list[torch.Tensor]:
        if self.c.norm == "post":
            return self.weights[head]
        starts = [w[head] for w in self.m.initial]
        return [at_start_norm(w, s) for w, s in zip(self.weights[head], starts, strict=True)]

    def segment(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        out = []
        for x in xs:
            parts = []
            for head in range(HEADS):
                q = self.vectors(x)[0, head]
                found = fast(q / q.norm(), self.used(head))
                scale = F.silu(self.m.scale_proj(x))[head]
                parts.append(scale * found / (found.square().mean() + 1e-6).sqrt() * self.m.o_norm)
            out.append(self.m.o_proj(torch.cat(parts)))
        for head in range(HEADS if xs else 0):
            self.step(xs, head)
        return out

    def gate(self, x: torch.Tensor, head: int) -> torch.Tensor:
        if self.c.write_gate == "none":
            return torch.ones((), dtype=x.dtype)
        gate = torch.sigmoid(self.m.gate_proj(x))[head]
        if self.c.write_gate == "hard":
            gate = (gate * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
        return gate if gate >= self.c.write_threshold else 0 * gate

    def step(self, xs: list[torch.Tensor], head: int) -> None:
        gates = [self.gate(x, head) for x in xs]
        most = max(gates)
        if most == 0:
            return
        used = self.used(head)
        new_weights, new_momentum = [], []
        for index, weight in enumerate(used):
            gain = torch.zeros((), dtype=torch.float64)
            for x, gate in zip(xs, gates, strict=True):
                _, k, v = self.vectors(x)[:, head]
                rate = F.softplus(self.m.rate_proj(x).view(3, HEADS)[index, head])
                gain = gain + gate * rate * (fast(k / k.norm(), used) @ v)
            (step,) = torch.autograd.grad(gain, weight, create_graph=True)
            if self.c.momentum:
                kept = sum(torch.sigmoid(self.m.momentum_proj(x)[head]) for x in xs) / len(xs)
                kept = most * kept + (1 - most)
                step = step + kept * self.momentum[head][index]
            new_momentum.append(step)
            moved = self.weights[head][index] + most * (muon(step) if self.c.muon else step)
            start = self.m.initial[index][head]
            new_weights.append(at_start_norm(moved, start) if self.c.norm == "post" else moved)
        self.weights[head], self.momentum[head] = new_weights, new_momentum


def check(segments: int = 3, **options) -> tuple[LaCT, list[Row]]:
    memory = cell(**options)
    rows, state = [Row(memory) for _ in range(ROWS)], memory.init_state(ROWS)
    found, expected = torch.zeros(()), torch.zeros(())
    for x, mask in texts(segments):
        y, state = memory(x, state, lambda x: x, mask=mask)
        for index, row in enumerate(rows):
            at = mask[index].nonzero().flatten()
            for t, answer in zip(at, row.segment(list(x[index, at])), strict=True):
                torch.testing.assert_close(y[index, t], x[index, t] + answer, **EXACT)
                found = found + y[index, t].sin().sum()
                expected = expected + (x[index, t] + answer).sin().sum()
            for head in range(HEADS):
                for i, weight in enumerate(row.weights[head]):
                    torch.testing.assert_close(state.weights[i][index, head], weight, **EXACT)
                if state.momentum:
                    for i, step in enumerate(row.momentum[head]):
                        torch.testing.assert_close(state.momentum[i][index, head], step, **EXACT)
    parameters = list(memory.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    return memory, rows


@pytest.mark.parametrize(
    ("norm", "muon", "gate"),
    [
        ("post", False, "none"),
        ("pre", False, "sigmoid"),
        ("pre", False, "hard"),
        ("post", True, "sigmoid"),
        ("post", True, "hard"),
        ("pre", True, "none"),
    ],
)
def test_equals_steps_up_autograd_s_gradient(norm: str, muon: bool, gate: str) -> None:
    check(norm=norm, muon=muon, write_gate=gate)


@pytest.mark.parametrize(
    "options",
    [{"momentum": False}, {"expansion": 2, "muon": True}, {"write_threshold": 0.5}],
    ids=str,
)
def test_options_equal_the_definition(options: dict) -> None:
    check(**options)


@torch.no_grad()
def test_the_sum_of_steps_is_plain_ascent() -> None:
    memory = cell(momentum=False, norm="pre", write_gate="none")
    (x, _) = texts(1)[0]
    state = memory.init_state(ROWS)
    _, new = memory(x, state, lambda x: x, mask=None)
    for row in range(ROWS):
        with torch.enable_grad():
            weights = [w.detach()[0].clone().requires_grad_() for w in memory.initial]
            shrunk = [w / (w.norm(dim=0) + 1e-5) * w.norm(dim=0).detach() for w in weights]
            used = [w.detach().requires_grad_() for w in shrunk]
            _, k, v = F.silu(memory.qkv_proj(x[row])).view(T, 3, HEADS, -1)[:, :, 0].unbind(1)
            rates = F.softplus(memory.rate_proj(x[row])).view(T, 3, HEADS)[:, :, 0]
            values = (fast(F.normalize(k, dim=-1), used) * v).sum(1)
            for index in range(3):
                gain = (rates[:, index] * values).sum()
                (step,) = torch.autograd.grad(gain, used[index], retain_graph=True)
                moved = new.weights[index][row, 0] - state.weights[index][row, 0]
                torch.testing.assert_close(moved, step, **EXACT)


def test_the_ascent_has_a_gradient_of_its_own() -> None:
    g = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64, requires_grad=True)

    weights = random(1, 1, 2, 3), random(1, 1, 3, 2), random(1, 1, 2, 3)
    k, v, rates = random(1, 1, 4, 2), random(1, 1, 4, 2), random(3, 1, 1, 4, 1)
    assert torch.autograd.gradcheck(lambda *a: ascent(*a[:3], a[3:]), (k, v, rates, *weights))


@torch.no_grad()
def test_an_orthogonal_step_keeps_its_directions() -> None:
    g = torch.Generator().manual_seed(0)
    for shape in ((2, 5, 8), (2, 8, 5), (2, 6, 6)):
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        found = orthogonal(x)
        torch.testing.assert_close(found, torch.stack([muon(one) for one in x]), **EXACT)
        singular = torch.linalg.svdvals(found)
        assert singular.min() > 0.7 and singular.max() < 1.3
        # Its size does not depend on the step's.
        torch.testing.assert_close(orthogonal(1e3 * x), found, rtol=0, atol=1e-4)
    assert orthogonal(torch.zeros(1, 3, 3)).eq(0).all()


@pytest.mark.parametrize("options", [{}, {"muon": True}, {"norm": "pre"}], ids=str)
@torch.no_grad()
def test_shut_gates_leave_all_as_it_was(options: dict) -> None:
    (x, _), (filler, _) = texts(2)
    memory = cell(write_gate="hard", **options)
    _, state = memory(x, memory.init_state(ROWS), lambda x: x, mask=None)
    memory.gate_proj.bias.fill_(-100.0)
    _, after = memory(filler, state, lambda x: x, mask=None)
    for name in ("weights", "momentum"):
        for a, b in zip(getattr(after, name), getattr(state, name), strict=True):
            assert torch.equal(a, b)
    assert state.written.all() and not after.written.any()


@torch.no_grad()
def test_the_published_muon_takes_a_full_step_at_any_rate() -> None:
    (x, _) = texts(1)[0]
    moved = {}
    for muon in (False, True):
        memory = cell(write_gate="none", muon=muon)
        memory.rate_proj.bias.fill_(-12.0)
        start = memory.init_state(ROWS)
        _, state = memory(x, start, lambda x: x, mask=None)
        moved[muon] = (state.weights[1] - start.weights[1]).norm() / start.weights[1].norm()
    assert moved[True] > 0.3 and moved[False] < 1e-3


def test_the_paper_s_settings() -> None:
    config = LaCTConfig.paper()
    assert config.muon and config.momentum and config.write_gate == "none"
    assert (config.num_heads, config.initial_rate, config.norm) == (4, 0.001, "post")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "none"}, "norm='none' is unknown; use one of post, pre"),
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=6"),
        ({"expansion": 0}, "expansion=0 must be at least 1"),
        ({"initial_rate": 0.0}, "initial_rate=0.0 must be above 0"),
        ({"write_gate": "none", "write_cost": 0.1}, "write_cost=0.1 needs write gates"),
        ({"write_gate": "soft"}, "write_gate='soft' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
