"""The gated delta rules against their recurrence, one row, head and token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlm import MemLMForCausalLM
from memlm.memory import GatedDeltaConfig
from memlm.memory.base import Dims
from memlm.memory.gated_delta import GatedDelta
from memlm.memory.parts.delta_block import RULES
from memlm.memory.parts.delta_rule import Tokens, delta_rule
from memlm.memory.parts.feature_maps import pair_product
from memlm.memory.parts.gates import STRETCH, open_gate
from tests.cases import SEGMENT, base_model, randomise, tokens

EXACT = {"rtol": 0.0, "atol": 1e-10}
D, T, ROWS = 6, 7, 2
rules = pytest.mark.parametrize("rule", RULES)


def cell(**options) -> GatedDelta:
    dims = Dims(D, D, 1, 2, 2, 3, T)
    memory = GatedDelta(GatedDelta.resolve(GatedDeltaConfig(**options), dims), dims).double()
    memory.reset_parameters(1.0)
    randomise(memory)
    return memory


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
    """One row of the block, by the papers' equations: lists of numbers, and no chunks."""

    def __init__(self, memory: GatedDelta) -> None:
        self.m, self.c = memory, memory.config
        self.state = torch.zeros(memory.heads, memory.keys, memory.values, dtype=torch.float64)
        self.past: list[list[torch.Tensor]] = [[] for _ in memory.kernels]
        self.gates: list[torch.Tensor] = []

    def project(self, x: torch.Tensor, linear, stream: int) -> torch.Tensor:
        z = linear(x)
        if self.c.conv_size:
            self.past[stream].append(z)
            kernel = self.m.kernels[stream][:, 0]
            recent = self.past[stream][::-1][: self.c.conv_size]
            z = sum(kernel[:, -1 - i] * old for i, old in enumerate(recent))
        return F.silu(z)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """Of length 1; as pairs, every product of a half's numbers and sqrt(1/2) with the other's."""
        if self.c.key_map == "none":
            return x / x.norm()
        first, second = (
            [*(half / half.norm()).tolist(), 0.5**0.5]
            for half in (x[: len(x) // 2], x[len(x) // 2 :])
        )
        products = torch.tensor([a * b for a in first for b in second], dtype=x.dtype)
        return products / products.norm()

    def token(self, x: torch.Tensor) -> torch.Tensor:
        m, rule, steps = self.m, RULES[self.c.rule], self.c.householder_steps
        q = self.project(x, m.q_proj, 0).view(m.heads, -1)
        k = self.project(x, m.k_proj, 1).view(steps, m.heads, -1)
        v = self.project(x, m.v_proj, 2).view(steps, m.heads, m.values)
        gate = 1 / (1 + torch.exp(-m.b_proj(x).view(steps, m.heads)))
        if self.c.write_gate == "hard":
            gate = (gate * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
        gate = gate * (gate >= self.c.write_threshold)
        self.gates.append(gate)
        out = torch.zeros(m.heads, m.values, dtype=torch.float64)
        for head in range(m.heads):
            if rule.decay != "none":
                speed = F.softplus(m.a_proj(x) + m.dt_bias).view(m.heads, -1)[head]
                log = -m.A_log[head].exp() * speed
                most = gate[:, head].max()
                if self.c.write_gate == "hard":
                    log = log * most
                elif self.c.write_threshold:
                    log = log * (most > 0)
                self.state[head] = log.exp().view(-1, 1) * self.state[head]
            for step in range(steps):
                key, value = k[step, head], v[step, head]
                rate = gate[step, head] * (2 if self.c.negative_eigenvalues else 1)
                if rule.unit_keys:
                    key = self.normed(key)
                else:
                    rate = rate / (key @ key + 1e-6)
                known = key @ self.state[head] if rule.erases else 0.0
                self.state[head] = self.state[head] + rate * torch.outer(key, value - known)
            found = self.normed(q[head]) @ self.state[head] / m.keys**0.5
            out[head] = found / (found.square().mean() + 1e-6).sqrt() * m.o_norm
        return m.o_proj(out.flatten() * F.silu(m.g_proj(x)))


def check(**options) -> None:
    memory = cell(**options).eval()
    state = memory.init_state(ROWS)
    rows = [Row(memory) for _ in range(ROWS)]
    with torch.no_grad():
        for x, mask in texts(3):
            y, new = memory(x, state, lambda x: x, mask=mask)
            for index, row in enumerate(rows):
                for t in mask[index].nonzero().flatten().tolist():
                    expected = x[index, t] + row.token(x[index, t])
                    torch.testing.assert_close(y[index, t], expected, **EXACT)
            # Rows whose document has ended are the house's business.
            state = new
            for index, row in enumerate(rows):
                torch.testing.assert_close(state.memory[index], row.state, **EXACT)
                for tail, past in zip(state.tails, row.past, strict=True):
                    kept = past[-len(tail[index]) :]
                    torch.testing.assert_close(
                        tail[index][-len(kept) :], torch.stack(kept), **EXACT
                    )


@pytest.mark.parametrize("rule", ["delta", "kda"])
def test_pairs_equal_the_recurrence_token_by_token(rule: str) -> None:
    check(rule=rule, key_map="product", num_heads=2, head_dim=4, value_dim=3, chunk_length=3)


def test_pairs_of_words_are_kept_apart() -> None:
    """Of 36 pairs of six words each, all have keys of their own; sums of two words span eleven."""
    words = torch.eye(6, dtype=torch.float64)
    pairs = torch.stack([torch.cat([a, b]) for a in words for b in words])
    keys = pair_product(pairs)
    assert int(torch.linalg.matrix_rank(keys)) == 36 and int(torch.linalg.matrix_rank(pairs)) == 11
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(36, dtype=torch.float64), **EXACT)


@rules
@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
def test_equals_the_recurrence_token_by_token(rule: str, gate: str) -> None:
    check(rule=rule, write_gate=gate, chunk_length=3)


@pytest.mark.parametrize(
    "options",
    [
        {"conv_size": 0},
        {"householder_steps": 2},
        {"householder_steps": 3, "rule": "delta", "negative_eigenvalues": True, "conv_size": 2},
        {"householder_steps": 2, "rule": "kda", "write_gate": "hard"},
        {"num_heads": 3, "head_dim": 4, "value_dim": 5},
        {"write_threshold": 0.5},
        {"write_threshold": 0.5, "write_gate": "hard", "rule": "gla"},
    ],
    ids=str,
)
def test_options_equal_the_recurrence(options: dict) -> None:
    check(chunk_length=4, **options)


@pytest.mark.parametrize("decay", [None, "head", "channel"])
@pytest.mark.parametrize("erases", [False, True])
def test_chunks_change_nothing_and_have_autograds_gradients(
    decay: str | None, erases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    shape, dk, dv = (2, 3, 37), 5, 4

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    parts = {
        "query": random(2, 3, 2, 37, dk),
        "key": random(*shape, dk),
        "value": random(*shape, dv),
        "step": 0.3 * random(*shape),
        "log_decay": None
        if decay is None
        else -random(*shape, *((dk,) if decay == "channel" else ())).abs(),
    }
    parts = {k: None if v is None else v.requires_grad_() for k, v in parts.items()}
    start = random(2, 3, dk, dv).requires_grad_()

    def plainly() -> tuple[torch.Tensor, torch.Tensor]:
        state, found = start, []
        for t in range(shape[2]):
            at = {k: None if v is None else v[:, :, t] for k, v in list(parts.items())[1:]}
            if decay:
                log = at["log_decay"].reshape(2, 3, -1, 1)
                state = log.exp() * state
            delta = at["value"]
            if erases:
                delta = delta - torch.einsum("bhk,bhkv->bhv", at["key"], state)
            delta = at["step"].unsqueeze(-1) * delta
            state = state + at["key"].unsqueeze(-1) * delta.unsqueeze(-2)
            found.append(torch.einsum("bhrk,bhkv->bhrv", parts["query"][:, :, :, t], state))
        return torch.stack(found, 3), state

    wanted = [v for v in parts.values() if v is not None] + [start]
    expected = plainly()
    weight = random(*expected[0].shape)
    slow = torch.autograd.grad((expected[0] * weight).sum() + expected[1].sum(), wanted)
    # The last two: a chunk by itself, and two together where decay is not by channel.
    for chunk, at_once in ((1, 2**17), (8, 2**17), (64, 2**17), (8, 400), (8, 800)):
        monkeypatch.setattr("memlm.memory.parts.delta_rule.AT_ONCE", at_once)
        found = delta_rule(Tokens(**parts, erases=erases), start, chunk)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        fast = torch.autograd.grad((found[0] * weight).sum() + found[1].sum(), wanted)
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-8)


def test_a_hard_gate_reaches_both_ends_exactly() -> None:
    logits = torch.tensor([-9.0, -2.5, 0.0, 2.5, 9.0])
    assert open_gate(logits, "hard").tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert (open_gate(logits, "sigmoid") > 0).all()
    assert open_gate(logits, "sigmoid", 0.1).tolist()[:2] == [0.0, 0.0]
    assert open_gate(logits, "hard", float("inf")).tolist() == [0.0] * 5


@rules
def test_strong_decay_stays_finite_in_single_precision(rule: str) -> None:
    memory = cell(rule=rule).float()
    with torch.no_grad():
        if hasattr(memory, "dt_bias"):
            memory.dt_bias.fill_(30.0)
    x = (10 * torch.randn(1, 200, D)).requires_grad_()
    y, state = memory(x, memory.init_state(1), lambda x: x, mask=None)
    (y.sum() + state.memory.sum()).backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": "delte"}, "rule='delte' is unknown; use one of linear"),
        ({"write_gate": "soft"}, "write_gate='soft' is unknown"),
        ({"write_threshold": -0.1}, "write_threshold=-0.1"),
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=6"),
        ({"householder_steps": 0}, "householder_steps=0 must be at least 1"),
        ({"conv_size": -1}, "conv_size=-1"),
        ({"write_cost": -1.0}, "write_cost"),
        ({"key_map": "sum"}, "key_map='sum'"),
        ({"key_map": "product", "head_dim": 3}, "head_dim=3 must be even"),
        ({"key_map": "product", "rule": "kaczmarz", "head_dim": 4}, "rule='kaczmarz'"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)


def test_convolutions_start_as_if_they_were_not_there_or_at_random() -> None:
    plain, random = (
        torch.cat([kernel.flatten(0, 1) for kernel in cell(conv_size=4, conv_std=std).kernels])
        for std in (0.0, 0.3)
    )
    # `cell` adds noise of its own to what the mechanism starts with.
    bare = cell(conv_size=4)
    bare.reset_parameters(1.0)
    plain, random = plain.detach(), random.detach()
    for kernel in bare.kernels:
        assert torch.equal(
            kernel[:, 0].detach(), torch.eye(4, dtype=kernel.dtype)[-1].expand(len(kernel), 4)
        )
    assert float(plain[:, :-1].std()) < float(random[:, :-1].std())
    assert abs(float(random[:, -1].mean())) < 0.3 < float(plain[:, -1].mean())


def test_some_rows_go_without_a_layer_s_answers_in_training() -> None:
    memory = cell(read_dropout=0.5).train()
    x = torch.randn(64, T, D, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y, state = memory(x, memory.init_state(64), lambda x: x, mask=None)
    whole, same = memory.eval()(x, memory.init_state(64), lambda x: x, mask=None)
    dropped = (y == x).flatten(1).all(dim=1)
    assert 16 < dropped.sum() < 48
    assert torch.equal(y[~dropped], whole[~dropped])
    # What is written does not depend on what was answered.
    assert torch.equal(state.memory, same.memory)


def dropping(schedule: str) -> MemLMForCausalLM:
    """A model in training of which every layer leaves out half of its rows."""
    return MemLMForCausalLM.from_base(
        base_model("llama"),
        memory=GatedDeltaConfig(read_dropout=0.5, output_std=0.5),
        segment_length=SEGMENT,
        schedule=schedule,
    ).train()


@pytest.mark.parametrize("schedule", ["sequential", "wavefront"])
def test_every_layer_is_dropped_by_itself(schedule: str) -> None:
    model = dropping(schedule)
    ids = tokens(64, 2 * SEGMENT)
    first, second = slice(0, SEGMENT), slice(SEGMENT, None)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        logits = model(ids).logits
        # Who went without the second layer's answers, and who without any.
        upper = model.memory.attached["gated-delta"].cells["1"]
        upper.o_proj.weight.zero_()
        lower = model.eval()(ids).logits
        model.memory.attached["gated-delta"].cells["0"].o_proj.weight.zero_()
        neither = model(ids).logits

    def are(reference: torch.Tensor, where: slice) -> torch.Tensor:
        return (logits - reference)[:, where].abs().amax(dim=(1, 2)) < 1e-9

    without_upper, without_both = (are(one, first) for one in (lower, neither))
    assert 6 < without_both.sum() < 26 and 6 < without_upper.sum() < 26
    # The wavefront runs the first layer's second segment and the second's first in one call.
    told = are(lower, second) | are(neither, second)
    same = (without_upper | without_both) == are(neither, second)
    assert 0.25 < same[told].double().mean() < 0.75


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_of_rows_is_refused_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"read_dropout=.* must be from 0 to below 1"):
        cell(read_dropout=share)
