"""Yaad against Huber's loss as it is defined, token by token, with autograd's gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memlm.memory import TitansMAGConfig, YaadConfig
from memlm.memory.base import Dims
from memlm.memory.parts.memory_rules import Huber, Rule
from memlm.memory.yaad import Yaad
from memlm.modeling import MemLMForCausalLM
from tests.cases import SEGMENT, base_model, memory_model, tokens
from tests.memory.test_deep_memory import (
    LIMIT,
    Case,
    case_of,
    fast,
    gradients,
    holes,
    oracle,
    real_only,
    same,
    weighted,
)

YAAD = Rule(objective=Huber())


def bounds(case: Case) -> Tensor:
    """Some below the errors, some above."""
    return 3 * torch.rand(case.rate.shape, dtype=torch.float64) + 0.5


def huber(bound: Tensor):
    """|e|^2, or beyond the bound what touches it there as a line."""

    def cost(error: Tensor, t: int) -> Tensor:
        size, edge = error.norm(dim=-1), bound[:, :, t : t + 1]
        seen.append(size.detach() > edge)
        return torch.where(size <= edge, size**2, 2 * edge * size - edge**2).sum()

    seen: list[Tensor] = []
    cost.seen = seen
    return cost


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize(("depth", "chunk"), [(1, 1), (2, 1), (2, 4), (3, 4)])
def test_values_and_gradients_are_huber_s(depth: int, chunk: int, limit: float | None) -> None:
    case, mask = case_of(depth).needing_grad(), holes()
    bound = bounds(case).requires_grad_()
    cost = huber(bound)
    expected, _ = oracle(case, chunk=chunk, limit=limit, mask=mask, cost=cost)
    beyond = torch.cat(cost.seen)
    assert beyond.any() and not beyond.all()
    ours = fast(case, chunk=chunk, limit=limit, mask=mask, rule=YAAD, bound=bound)
    plain = fast(case, chunk=chunk, limit=limit, mask=mask, rule=YAAD, bound=bound.detach())
    expected, ours = real_only(expected, mask), real_only(ours, mask)
    same(ours, expected, 1e-10)
    same(real_only(plain, mask), ours, 0.0)
    leaves = [*case.leaves(), bound]
    found, wanted = (torch.autograd.grad(weighted(x), leaves) for x in (ours, expected))
    assert all(g.abs().max() > 1e-3 for g in wanted)
    same(found, wanted, 1e-9, 1e-9)
    with torch.no_grad():
        reading = fast(case, chunk=chunk, limit=limit, mask=mask, rule=YAAD, bound=bound)
    same(real_only(reading, mask), ours, 1e-12)


def test_a_bound_beyond_all_errors_is_titans() -> None:
    case = case_of().needing_grad()
    endless = torch.full_like(case.rate, float("inf"))
    ours, titans = (
        fast(case, chunk=4, limit=LIMIT, **options)
        for options in ({"rule": YAAD, "bound": endless}, {})
    )
    same(ours, titans, 0.0)
    same(gradients(ours, case), gradients(titans, case), 1e-12, 1e-12)


@torch.no_grad()
def test_yaad_without_a_bound_is_titans_without_momentum() -> None:
    """The whole model: two mechanisms of two names."""
    ids = tokens(2, 3 * SEGMENT + 1)
    sizes = {"num_heads": 2, "chunk_length": 4, "conv_size": 3}
    yaad = memory_model("llama", YaadConfig(**sizes, initial_bound=float("inf")))
    titans = memory_model("llama", TitansMAGConfig(**sizes, momentum=False))
    bounded = memory_model("llama", YaadConfig(**sizes, initial_bound=0.1))
    for model in (titans, bounded):
        # A gate more than Titans has, the last of them.
        known = {name.replace("yaad", "titans-mag"): p for name, p in yaad.named_parameters()}
        for name, parameter in model.named_parameters():
            source = known[name.replace("yaad", "titans-mag")]
            if ".gates." in name and model is bounded:
                source = torch.cat([source[:-2], parameter[-2:]])
            parameter.copy_(source[: len(parameter)])
    expected = titans(ids).logits
    torch.testing.assert_close(yaad(ids).logits, expected, rtol=0, atol=1e-10)
    assert (bounded(ids).logits - expected).abs().max() > 1e-3


def test_no_token_pulls_harder_than_its_bound() -> None:
    """One value a thousand times as large: the square's step grows with it, Huber's does not."""
    case = case_of(length=8)
    case = case._replace(log_momentum=None, momentum=())
    far = case._replace(v=case.v.clone())
    far.v[:, :, 5] *= 1e3
    one = torch.ones_like(case.rate)

    def moved(**options) -> float:
        near, other = (fast(c, chunk=8, limit=None, **options)[1:] for c in (case, far))
        return float(max((a - b).abs().max() for a, b in zip(near, other, strict=True)))

    assert moved() > 10
    assert moved(rule=YAAD, bound=one) < 2


def test_the_bound_starts_where_it_is_told_to() -> None:
    dims = Dims(12, 12, 1, 2, 2, 6, 8)
    for start in (0.01, 1.0, 30.0):
        memory = Yaad(YaadConfig(initial_bound=start).resolved(dims), dims)
        memory.reset_parameters(1.0)
        bias = memory.memory.gates.bias[-2:]
        torch.testing.assert_close(
            torch.nn.functional.softplus(bias), torch.full((2,), start), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (YaadConfig(objective="square"), "objective='square' is not the rule of YaadConfig"),
        (YaadConfig(momentum=True), "momentum=True is not the rule of YaadConfig"),
        (YaadConfig(initial_bound=0.0), "initial_bound=0.0 must be above 0"),
        (YaadConfig(initial_momentum=0.5), "initial_momentum=0.5 is read with momentum=True alone"),
        (TitansMAGConfig(initial_bound=2.0), "initial_bound=2.0 is read with objective='huber'"),
        (TitansMAGConfig(objective="hubert"), "objective='hubert' is unknown; use 'square' or 'h"),
    ],
)
def test_rules_that_cannot_be_are_refused(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("llama"), memory=config, segment_length=SEGMENT)
