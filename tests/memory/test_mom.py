"""Mixture-of-Memories against lists of tokens: each memory reads its own, one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm.memory import GatedDeltaConfig, MoMConfig
from memlm.memory.base import Dims
from memlm.memory.gated_delta import GatedDelta
from memlm.memory.mom import MoM
from memlm.memory.parts.delta_block import RULES
from memlm.memory.parts.gates import STRETCH
from tests.cases import randomise

EXACT = {"rtol": 0.0, "atol": 1e-10}
D, T, ROWS = 6, 9, 2
DIMS = Dims(D, D, 1, 2, 2, 3, T)


def cell(**options) -> MoM:
    memory = MoM(MoM.resolve(MoMConfig(**options), DIMS), DIMS).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory.eval()


def texts(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Segments (B, T, D) with masks that have holes; the second row ends before the last."""
    g = torch.Generator().manual_seed(0)
    found = []
    for index in range(count):
        mask = torch.rand(ROWS, T, generator=g) < 0.7
        mask[1] &= index + 1 < count
        found.append((torch.randn(ROWS, T, D, generator=g, dtype=torch.float64), mask))
    return found


class Row:
    """One row: its tokens so far, and what each memory holds after those that were sent to it."""

    def __init__(self, memory: MoM) -> None:
        self.m, self.c = memory, memory.config
        self.count = self.c.num_memories + (1 if self.c.shared_memory else 0)
        self.states = torch.zeros(
            self.count, memory.heads, memory.keys, memory.values, dtype=torch.float64
        )
        self.seen: list[torch.Tensor] = []
        self.sent: list[list[int]] = []

    def stream(self, weight: torch.Tensor, part: int, stream: int) -> torch.Tensor:
        """One set of rows of a projection, convolved over the text as it came, whoever got it."""
        width = self.m.heads * (self.m.values if stream == 2 else self.m.keys)
        weight = weight[part * width : (part + 1) * width]
        if not self.c.conv_size:
            return F.silu(weight @ self.seen[-1])
        kernel = self.m.kernels[stream][:, 0]
        recent = self.seen[::-1][: self.c.conv_size]
        return F.silu(sum(kernel[:, -1 - i] * (weight @ old) for i, old in enumerate(recent)))

    def write(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What the token does to one memory; its gates."""
        m, rule = self.m, RULES[self.c.rule]
        part = number if self.c.own_projections else 0
        k = self.stream(m.k_proj.weight, part, 1).view(m.heads, -1)
        v = self.stream(m.v_proj.weight, part, 2).view(m.heads, -1)
        gate = torch.sigmoid(m.b_proj(x)).view(-1, m.heads)[part]
        if self.c.write_gate == "hard":
            gate = (gate * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
        gate = gate * (gate >= self.c.write_threshold)
        for head in range(m.heads):
            state = self.states[number, head]
            if rule.decay != "none":
                rates = m.a_proj(x).view(-1, m.heads, len(m.dt_bias) // m.heads)[part, head]
                bias = m.dt_bias.view(m.heads, -1)[head]
                log = -m.A_log[head].exp() * F.softplus(rates + bias)
                if self.c.write_gate == "hard":
                    log = log * gate[head]
                elif self.c.write_threshold:
                    log = log * (gate[head] > 0)
                state = log.exp().view(-1, 1) * state
            key, rate = k[head], gate[head]
            if rule.unit_keys:
                key = key / key.norm()
            else:
                rate = rate / (key @ key + 1e-6)
            known = key @ state if rule.erases else 0.0
            self.states[number, head] = state + torch.outer(key, rate * (v[head] - known))
        return gate

    def token(self, x: torch.Tensor) -> torch.Tensor:
        m = self.m
        self.seen.append(x)
        logits = (m.router.weight @ x).tolist()
        chosen = sorted(range(len(logits)), key=lambda i: -logits[i])[: self.c.num_active]
        self.chance = torch.tensor(logits, dtype=torch.float64).softmax(0)
        share = torch.tensor([logits[i] for i in chosen], dtype=torch.float64).softmax(0)
        weights = dict(zip(chosen, share, strict=True))
        if self.c.shared_memory:
            weights[self.count - 1] = torch.tensor(1.0, dtype=torch.float64)
        self.sent.append(chosen)
        self.gates = {number: self.write(number, x) for number in weights}
        q = self.stream(m.q_proj.weight, 0, 0).view(m.heads, -1)
        out = torch.zeros(m.heads, m.values, dtype=torch.float64)
        for head in range(m.heads):
            query = q[head] / q[head].norm() / m.keys**0.5
            found = sum(w * (query @ self.states[i, head]) for i, w in weights.items())
            out[head] = found / (found.square().mean() + 1e-6).sqrt() * m.o_norm
        return m.o_proj(out.flatten() * F.silu(m.g_proj(x)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_memories": 3, "num_active": 3},
        {"shared_memory": False},
        {"own_projections": False, "conv_size": 0},
        {"rule": "kda", "write_gate": "hard"},
        {"rule": "kaczmarz", "num_heads": 1, "value_dim": 4},
        {"rule": "delta", "conv_size": 2},
        {"write_threshold": 0.5},
    ],
    ids=str,
)
@torch.no_grad()
def test_each_memory_reads_the_tokens_that_are_sent_to_it(options: dict) -> None:
    memory = cell(chunk_length=4, **options)
    state, rows = memory.init_state(ROWS), [Row(memory) for _ in range(ROWS)]
    active = memory.config.num_active
    for x, mask in texts(3):
        y, state = memory(x, state, lambda x: x, mask=mask)
        for index, row in enumerate(rows):
            real = mask[index].nonzero().flatten().tolist()
            load, chance = torch.zeros(2, memory.config.num_memories).double()
            gates = []
            for t in real:
                expected = x[index, t] + row.token(x[index, t])
                torch.testing.assert_close(y[index, t], expected, **EXACT)
                load[row.sent[-1]] += 1
                chance += row.chance
                gates.append(torch.stack(list(row.gates.values())))
            torch.testing.assert_close(state.memory[index], row.states, **EXACT)
            total = max(1, len(real))
            torch.testing.assert_close(state.load[index], load / active / total, **EXACT)
            torch.testing.assert_close(state.chance[index], chance / total, **EXACT)
            mean, most = (
                (torch.stack(gates).mean(), torch.stack(gates).max()) if gates else (0.0, 0.0)
            )
            assert abs(float(state.written[index] - mean)) < 1e-10
            assert abs(float(state.opened[index] - most)) < 1e-10
    if active < memory.config.num_memories:
        assert len({number for row in rows for sent in row.sent for number in sent}) > 1


@pytest.mark.parametrize("options", [{}, {"rule": "gla", "write_gate": "hard"}], ids=str)
@torch.no_grad()
def test_one_memory_is_gated_delta(options: dict) -> None:
    given = {"chunk_length": 4, "num_heads": 2, **options}
    memory = cell(num_memories=1, num_active=1, shared_memory=False, **given)
    plain = GatedDelta(GatedDelta.resolve(GatedDeltaConfig(**given), DIMS), DIMS).double().eval()
    weights = {k: v for k, v in memory.state_dict().items() if not k.startswith("router")}
    plain.load_state_dict(weights)
    state, other = memory.init_state(ROWS), plain.init_state(ROWS)
    for x, mask in texts(3):
        y, state = memory(x, state, lambda x: x, mask=mask)
        z, other = plain(x, other, lambda x: x, mask=mask)
        torch.testing.assert_close(y, z, **EXACT)
        torch.testing.assert_close(state.memory[:, 0], other.memory, **EXACT)
        torch.testing.assert_close(state[1:4], other[1:4], **EXACT)
    assert memory.auxiliary_loss(state, state) is None
    priced = cell(num_memories=1, num_active=1, shared_memory=False, write_cost=2.0, **given)
    torch.testing.assert_close(priced.auxiliary_loss(state, state), 2.0 * state.written, **EXACT)


@torch.no_grad()
def test_what_is_sent_elsewhere_leaves_a_memory_as_it_was() -> None:
    memory = cell()
    memory.router.weight.zero_()
    memory.router.weight[:, 0] = torch.tensor([2000.0, 1000.0, 0.0, -1000.0])
    x = torch.randn(1, T, D, dtype=torch.float64)
    x[..., 0] = 1.0
    before = memory.init_state(1)._replace(memory=torch.randn(1, 5, 2, 3, 3, dtype=torch.float64))
    _, after = memory(x, before, lambda x: x, mask=None)
    same = [torch.equal(after.memory[:, i], before.memory[:, i]) for i in range(5)]
    # The second memory has a weight of exactly zero, and is written all the same.
    assert same == [False, False, True, True, False]
    assert after.chance.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert after.load.tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_uneven_routing_costs_and_teaches_the_router() -> None:
    memory = cell(balance_cost=0.5, write_cost=2.0)
    x = torch.randn(ROWS, T, D, dtype=torch.float64)
    start = memory.init_state(ROWS)
    _, after = memory(x, start, lambda x: x, mask=None)
    expected = [
        2.0 * after.written[row]
        + 0.5 * 4 * sum(after.load[row, i] * after.chance[row, i] for i in range(4))
        for row in range(ROWS)
    ]
    cost = memory.auxiliary_loss(start, after)
    torch.testing.assert_close(cost, torch.stack(expected), **EXACT)
    even = after._replace(load=torch.full((ROWS, 4), 0.25), written=torch.zeros(ROWS))
    torch.testing.assert_close(
        memory.auxiliary_loss(start, even), torch.full((ROWS,), 0.5).double(), **EXACT
    )
    memory.config = MoM.resolve(MoMConfig(balance_cost=0.5), DIMS)
    (gradient,) = torch.autograd.grad(
        memory.auxiliary_loss(start, after).sum(), memory.router.weight
    )
    # A step against it makes routing more even.
    with torch.no_grad():
        memory.router.weight -= 0.05 * gradient / gradient.norm()
        _, then = memory(x, start, lambda x: x, mask=None)
        before, later = (4 * (after.load * state.chance).sum().detach() for state in (after, then))
    assert later < before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_memories": 0}, "num_memories=0 must be at least 1"),
        ({"num_active": 0}, "num_active=0 must be at least 1"),
        ({"num_active": 5}, "num_active=5 memories cannot be picked from num_memories=4"),
        ({"num_active": 1}, "num_active=1 of num_memories=4 teaches the router nothing"),
        ({"balance_cost": -1.0}, "balance_cost=-1.0"),
        ({"rule": "delte"}, "rule='delte' is unknown"),
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=6"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
