"""Moneta against its equations, token by token, norms taken where a chunk starts, autograd's gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from memlm.memory import MonetaConfig
from memlm.memory.parts.memory_rules import GATED, SQUARE, Huber, Normed, Power, Rule
from memlm.modeling import MemLMForCausalLM
from tests.cases import SEGMENT, base_model
from tests.memory.test_deep_memory import (
    B,
    H,
    case_of,
    fast,
    gated,
    gradients,
    holes,
    oracle,
    real_only,
    same,
    silu,
    weighted,
)
from tests.memory.test_omega import gated_case

LIMIT = 4.0
# So sharp that nothing of the smoothing is left.
SHARP = {"a": 1e7, "epsilon": 1e-30}


def power(p: float):
    def cost(error: Tensor, t: int) -> Tensor:
        return error.abs().pow(p).sum()

    return cost


def normed(q: float, units: list[Tensor], floor: float):
    """W over A: by the q-norm of each matrix in its unit."""

    def scale(held: Tensor, layer: int) -> Tensor:
        norm = held.abs().pow(q).sum(dim=(2, 3)).pow(1 / q) / units[layer]
        return 1 / norm.clamp(min=floor).pow(q - 2)[..., None, None]

    return scale


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize(
    ("hidden", "depth", "p", "q", "chunk"),
    [(silu, 1, 3, 4, 1), (silu, 2, 3, 4, 4), (silu, 3, 2.5, 3, 4), (gated, 2, 3, 4, 3)],
)
def test_values_and_gradients(hidden, depth, p, q, chunk, limit: float | None) -> None:
    case, mask = (gated_case(depth) if hidden is gated else case_of(depth)), holes()
    case = case._replace(rate=(0.02 if limit is None else 0.1) * case.rate).needing_grad()
    units = [torch.rand(B, H, dtype=torch.float64) + 1.5 for _ in case.weights]
    # One matrix is far below its unit: it is scaled by the floor, here not far from 1.
    units[0][1, 1] = 1e3
    units = [u.requires_grad_() for u in units]
    expected, _ = oracle(
        case,
        chunk=chunk,
        limit=limit,
        mask=mask,
        cost=power(p),
        hidden=hidden,
        scale=normed(q, units, 0.8),
    )
    activation = GATED if hidden is gated else Rule().activation
    rule = Rule(activation, Power(p, **SHARP), retention=Normed(q, floor=0.8))
    options = {"chunk": chunk, "limit": limit, "mask": mask, "rule": rule, "units": units}
    ours = fast(case, **options)
    expected, ours = real_only(expected, mask), real_only(ours, mask)
    same(ours, expected, 1e-9, 1e-9)
    leaves = [*case.leaves(), *units]
    found, wanted = (torch.autograd.grad(weighted(x), leaves) for x in (ours, expected))
    assert all(g.abs().max() > 1e-4 for g in wanted)
    same(found, wanted, 1e-8, 1e-8)
    with torch.no_grad():
        same(real_only(fast(case, **options), mask), ours, 1e-12)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("depth", [1, 2])
def test_errors_of_a_normed_answer(depth: int, limit: float | None) -> None:
    """Under Huber's loss, whose bound is the token's, and under the square."""
    case, mask = case_of(depth).needing_grad(), holes()
    bound = (2 * torch.rand(case.rate.shape, dtype=torch.float64) + 0.5).requires_grad_()

    def layer_norm(z: Tensor) -> Tensor:
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def huber(told: Tensor, t: int) -> Tensor:
        size, edge = (told - case.v[:, :, t : t + 1]).norm(dim=-1), bound[:, :, t : t + 1]
        return torch.where(size <= edge, size**2, 2 * edge * size - edge**2).sum()

    def square(told: Tensor, t: int) -> Tensor:
        return (told - case.v[:, :, t : t + 1]).square().sum()

    for cost, objective, own in ((huber, Huber(), bound), (square, SQUARE, None)):
        # The cost sees M(k) itself.
        bare = case._replace(v=torch.zeros_like(case.v))
        told = partial(lambda error, t, cost: cost(layer_norm(error), t), cost=cost)
        options = {"chunk": 4, "limit": limit, "mask": mask}
        expected, _ = oracle(bare, **options, cost=told)
        ours = fast(case, **options, rule=Rule(objective=objective, normed=True), bound=own)
        expected, ours = real_only(expected, mask), real_only(ours, mask)
        same(ours, expected, 1e-9, 1e-9)
        leaves = [*case.leaves(), *([] if own is None else [own])]
        found, wanted = (torch.autograd.grad(weighted(x), leaves) for x in (ours, expected))
        same(found, wanted, 1e-8, 1e-8)


def test_the_square_under_the_norm_of_two_is_titans() -> None:
    case = case_of().needing_grad()
    rule = Rule(objective=Power(2.0, **SHARP), retention=Normed(2.0))
    units = [torch.ones(B, H, dtype=torch.float64) for _ in case.weights]
    ours = fast(case, chunk=4, limit=LIMIT, rule=rule, units=units)
    titans = fast(case, chunk=4, limit=LIMIT)
    same(ours, titans, 1e-12)
    same(gradients(ours, case), gradients(titans, case), 1e-10, 1e-10)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 3.5])
def test_smoothed_powers(p: float) -> None:
    """Away from zero the gradient is p sign(e) |e|^(p - 1), at zero it is zero."""
    e = torch.tensor([-2.0, -0.5, 0.0, 1e-3, 0.7], dtype=torch.float64, requires_grad=True)
    objective = Power(p)
    found = objective.gradient(e, None)
    exact = p * e.sign() * e.abs().pow(p - 1)
    torch.testing.assert_close(found[[0, 1, 4]], exact[[0, 1, 4]], rtol=1e-3, atol=0)
    assert found[2] == 0 and found[3].abs() <= p
    grad = torch.linspace(1, 2, 5, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(found, e, grad)
    torch.testing.assert_close(objective.twice(e, None, grad)[0], wanted, rtol=1e-12, atol=1e-12)


def test_what_is_held_starts_as_the_weights() -> None:
    """In units of the start, the first chunk reads by the learned start itself."""
    held = torch.randn(3, 5, 4, dtype=torch.float64)
    retention = Normed(4.0)
    unit = retention.norm(held)
    torch.testing.assert_close(
        retention.scale(held, unit), torch.ones(3, 1, 1, dtype=torch.float64)
    )
    # Twice as much of the same makes weights half as large, and hardly anything ten times as large.
    assert torch.allclose(retention.scale(2 * held, unit), torch.tensor(0.25, dtype=torch.float64))
    assert torch.allclose(retention.scale(1e-9 * held, unit), torch.tensor(100.0).double())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MonetaConfig(objective="square"), "objective='square' is not the rule of MonetaConfig"),
        (MonetaConfig(retention="decay"), "retention='decay' is not the rule of MonetaConfig"),
        (MonetaConfig(error_power=0.5), "error_power=0.5 must be at least 1"),
        (MonetaConfig(norm_power=1.0), "norm_power=1.0 must be at least 2"),
    ],
)
def test_rules_that_cannot_be_are_refused(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("llama"), memory=config, segment_length=SEGMENT)
