"""Memory caching against lists of segments: one row, head and token at a time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from memlm.memory import MemoryCachingConfig
from memlm.memory.base import Dims
from memlm.memory.memory_caching import READS, MemoryCaching
from memlm.memory.parts.gates import STRETCH
from tests.cases import randomise

EXACT = {"rtol": 0.0, "atol": 1e-10}
D, T, ROWS = 6, 5, 2


def cell(**options) -> MemoryCaching:
    torch.manual_seed(0)
    dims = Dims(D, D, 1, 2, 2, 3, T)
    options = {"num_slots": 3, "top_k": 2, "chunk_length": 2, "conv_size": 3, **options}
    memory = MemoryCaching(MemoryCaching.resolve(MemoryCachingConfig(**options), dims), dims)
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


class Kept(NamedTuple):
    memory: torch.Tensor
    summary: torch.Tensor
    mass: float


class Row:
    """One row of a document: every segment by itself, then a list of those that are kept."""

    def __init__(self, memory: MemoryCaching, limit: int | None) -> None:
        self.m, self.c, self.limit = memory, memory.config, limit
        self.kept: list[Kept] = []
        self.replaced = 0
        self.last = torch.zeros(memory.heads, memory.keys, memory.values, dtype=torch.float64)

    def segment(self, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        m = self.m
        memory = self.last if self.c.continuing else torch.zeros_like(self.last)
        past: list[torch.Tensor] = []
        summed, total, mass = torch.zeros(D, dtype=torch.float64), 0.0, 0.0
        answers = []
        for x in xs:
            z = m.qkv_proj(x)
            if self.c.conv_size:
                past.append(z)
                z = sum(m.kernel[:, 0, -1 - i] * old for i, old in enumerate(past[::-1][:3]))
            gate = 1 / (1 + torch.exp(-m.b_proj(x)))
            if self.c.write_gate == "hard":
                gate = (gate * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)
            gate = gate * (gate >= self.c.write_threshold)
            share = gate.mean()
            mass += share
            here = share if self.c.summary == "written" else 1.0
            summed, total = summed + here * x, total + here
            questions, updated = [], []
            for head, part in enumerate(F.silu(z).view(m.heads, -1)):
                q, k, v = part.split([m.keys, m.keys, m.values])
                k = k / k.norm()
                questions.append(q / q.norm())
                known = k @ memory[head] if self.c.erases else 0.0
                updated.append(memory[head] + gate[head] * torch.outer(k, v - known))
            memory = torch.stack(updated)
            answers.append(self.answer(x, questions, memory, summed / max(total, 1e-6)))
        if xs:
            self.last = memory
            self.keep(Kept(memory, summed / max(total, 1e-6), mass))
        return answers

    def answer(self, x, questions, memory, summary) -> torch.Tensor:
        m = self.m
        cached = [one for one in self.kept if one.mass > 0]
        if self.c.read == "residual":
            weights = torch.ones(1 + len(cached))
        else:
            wanted = m.u_proj(x)
            if self.c.read == "top-k":
                cached = sorted(cached, key=lambda one: -(wanted @ one.summary))[: self.c.top_k]
            scores = [wanted @ summary, *(wanted @ one.summary for one in cached)]
            weights = torch.stack(scores).softmax(0)
        memories = [memory, *(one.memory for one in cached)]
        out = []
        for head, q in enumerate(questions):
            found = sum(w * (q @ one[head]) for w, one in zip(weights, memories, strict=True))
            out.append(found / (found.square().mean() + 1e-6).sqrt() * m.o_norm)
        return m.o_proj(torch.cat(out) * F.silu(m.g_proj(x)))

    def keep(self, new: Kept) -> None:
        if self.limit is None or len(self.kept) < self.limit:
            self.kept += [new] if new.mass > 0 else []
            return
        least = min(range(self.limit), key=lambda slot: self.kept[slot].mass)
        if new.mass > self.kept[least].mass:
            self.kept[least] = new
            self.replaced += 1


def check(limit: int | None, segments: int = 6, **options) -> list[Row]:
    memory = cell(**options)
    rows, state = [Row(memory, limit) for _ in range(ROWS)], memory.init_state(ROWS)
    found, expected = torch.zeros(()), torch.zeros(())
    for x, mask in texts(segments):
        y, state = memory(x, state, lambda x: x, mask=mask)
        for index, row in enumerate(rows):
            at = mask[index].nonzero().flatten()
            for t, answer in zip(at, row.segment(list(x[index, at])), strict=True):
                torch.testing.assert_close(y[index, t], x[index, t] + answer, **EXACT)
                found = found + y[index, t].sin().sum()
                expected = expected + (x[index, t] + answer).sin().sum()
            for slot, one in enumerate(row.kept):
                torch.testing.assert_close(state.memory[index, :, slot], one.memory, **EXACT)
                torch.testing.assert_close(state.summaries[index, slot], one.summary, **EXACT)
                torch.testing.assert_close(state.mass[index, slot], one.mass, **EXACT)
            assert not state.mass[index, len(row.kept) :].any()
            if memory.config.continuing:
                torch.testing.assert_close(state.last[index], row.last, **EXACT)
    parameters = list(memory.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    return rows


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("gate", ["sigmoid", "hard"])
def test_equals_a_list_with_its_lightest_segment_replaced(read: str, gate: str) -> None:
    rows = check(3, read=read, write_gate=gate)
    assert sum(row.replaced for row in rows) >= 2


@pytest.mark.parametrize("read", READS)
def test_with_a_slot_for_each_segment_equals_the_sum_of_all(read: str) -> None:
    check(None, num_slots=6, top_k=6, read=read)


def test_reading_all_best_slots_is_reading_all() -> None:
    outputs = []
    for read in ("top-k", "gated", "soup"):
        memory = cell(num_slots=5, top_k=5, read=read)
        state = memory.init_state(ROWS)
        for x, mask in texts(6):
            y, state = memory(x, state, lambda x: x, mask=mask)
        outputs.append(y)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], **EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"summary": "mean"},
        {"conv_size": 0},
        {"erases": False},
        {"continuing": True},
        {"continuing": True, "erases": False, "read": "gated", "write_gate": "hard"},
        {"write_threshold": 0.5},
        {"num_heads": 3, "head_dim": 4, "value_dim": 5},
    ],
    ids=str,
)
def test_options_equal_the_list(options: dict) -> None:
    check(3, **options)


def test_going_on_from_the_segment_before_is_one_memory_read_as_it_was() -> None:
    """A linear one: slots hold the running sums at the segments' ends."""
    memory = cell(continuing=True, erases=False, conv_size=0, num_slots=4, read="residual")
    state, sums = memory.init_state(ROWS), []
    whole = torch.zeros(ROWS, memory.heads, memory.keys, memory.values, dtype=torch.float64)
    for x, _ in texts(4):
        z = F.silu(memory.qkv_proj(x)).view(ROWS, T, memory.heads, -1)
        _, k, v = z.split([memory.keys, memory.keys, memory.values], dim=-1)
        gate = torch.sigmoid(memory.b_proj(x))
        whole = whole + torch.einsum("bth,bthk,bthv->bhkv", gate, F.normalize(k, dim=-1), v)
        sums.append(whole)
        _, state = memory(x, state, lambda x: x, mask=None)
    torch.testing.assert_close(state.last, whole, **EXACT)
    torch.testing.assert_close(state.memory, torch.stack(sums, dim=2), **EXACT)


@torch.no_grad()
def test_what_is_stored_is_never_written_again() -> None:
    memory = cell(write_gate="hard")
    state = memory.init_state(1)
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        x = torch.randn(1, T, D, generator=g, dtype=torch.float64)
        # Every other segment's gates are shut.
        memory.b_proj.bias.fill_(0.0)
        _, state = memory(x, state, lambda x: x, mask=None)
        memory.b_proj.bias.fill_(-100.0)
        _, after = memory(x, state, lambda x: x, mask=None)
        assert all(torch.equal(a, b) for a, b in zip(after[:3], state[:3], strict=True))
        memory.b_proj.bias.fill_(0.0)
        _, after = memory(x.flip(1), state, lambda x: x, mask=None)
        changed = (after.memory != state.memory).any(dim=1).flatten(2).any(dim=2)
        assert changed.sum() <= 1
        assert torch.equal(changed, after.mass != state.mass)
        state = after


def test_the_paper_s_settings() -> None:
    config = MemoryCachingConfig.paper()
    assert (config.read, config.summary, config.erases) == ("gated", "mean", False)
    cell(**{name: getattr(config, name) for name in ("read", "summary", "erases", "num_slots")})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"read": "best"}, "read='best' is unknown; use one of top-k"),
        ({"summary": "sum"}, "summary='sum' is unknown"),
        ({"top_k": 4}, "top_k=4 is more than num_slots=3"),
        ({"num_slots": 0}, "num_slots=0 must be at least 1"),
        ({"write_gate": "soft"}, "write_gate='soft' is unknown"),
        ({"num_heads": 5}, "num_heads=5 does not divide hidden_size=6"),
        ({"write_cost": -1.0}, "write_cost"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cell(**options)
