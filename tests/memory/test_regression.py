"""What docs/regression.md derives: rules as regressions, by autograd or solved exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memlm.memory.parts.delta_rule import Tokens, delta_rule
from memlm.memory.parts.feature_maps import pair_product

T, DK, DV = 6, 8, 5


def pairs(count: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (1, 1, T, d); keys of length 1."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 1, count, size, generator=make, dtype=torch.float64) for size in (DK, DK, DV)
    )
    return q, k / k.norm(dim=-1, keepdim=True), v


def written(k: Tensor, v: Tensor, step: Tensor | float, **how: object) -> Tensor:
    """The matrix (dk, dv) after these pairs, from nothing."""
    gates = torch.as_tensor(step, dtype=torch.float64).expand(k.shape[:3])
    tokens = Tokens(k.unsqueeze(2), k, v, gates, **how)  # type: ignore[arg-type]
    return delta_rule(tokens, k.new_zeros(1, 1, k.shape[-1], v.shape[-1]), 4)[1][0, 0]


def test_linear_attention_is_least_squares_without_covariance() -> None:
    _, k, v = pairs()
    k, v = torch.linalg.qr(k[0, 0].mT)[0].mT[None, None], v  # Orthonormal keys: K K^T = I.
    exact = torch.linalg.lstsq(k[0, 0], v[0, 0]).solution
    for erases in (False, True):
        torch.testing.assert_close(written(k, v, 1.0, erases=erases), exact, rtol=0, atol=1e-12)


def test_linear_attention_is_a_gradient_step_from_nothing() -> None:
    _, k, v = pairs()
    zero = torch.zeros(DK, DV, dtype=torch.float64, requires_grad=True)
    (0.5 * (v[0, 0] - k[0, 0] @ zero).square().sum()).backward()
    assert zero.grad is not None
    torch.testing.assert_close(written(k, v, 1.0, erases=False), -zero.grad, rtol=0, atol=1e-12)


def test_the_delta_rule_is_a_gradient_step_on_the_newest_pair() -> None:
    _, k, v = pairs()
    matrix = torch.zeros(DK, DV, dtype=torch.float64)
    for t in range(T):
        here = matrix.clone().requires_grad_()
        (0.5 * (v[0, 0, t] - k[0, 0, t] @ here).square().sum()).backward()
        assert here.grad is not None
        matrix = matrix - 0.3 * here.grad
    torch.testing.assert_close(written(k, v, 0.3), matrix, rtol=0, atol=1e-12)


def test_kaczmarz_lands_on_the_newest_pair_and_solves_what_can_be_solved() -> None:
    _, k, v = pairs()
    k = 3 * k
    step = 1 / k.square().sum(dim=-1)
    matrix = written(k, v, step)
    torch.testing.assert_close(k[0, 0, -1] @ matrix, v[0, 0, -1], rtol=0, atol=1e-12)
    # Fewer equations than unknowns: reading them again and again leads to the smallest exact solution.
    often = [part.repeat(1, 1, 2000, 1) for part in (k, v)]
    exact = torch.linalg.pinv(k[0, 0]) @ v[0, 0]
    solved = written(*often, step.repeat(1, 1, 2000))
    torch.testing.assert_close(solved, exact, rtol=0, atol=1e-6)


def test_a_decay_weighs_old_pairs_less() -> None:
    _, k, v = pairs()
    keep = torch.full((1, 1, T), 0.8, dtype=torch.float64).log()
    ages = 0.8 ** torch.arange(T - 1, -1, -1, dtype=torch.float64)
    weighted = torch.einsum("t,tk,tv->kv", ages, k[0, 0], v[0, 0])
    found = written(k, v, 1.0, erases=False, log_decay=keep)
    torch.testing.assert_close(found, weighted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pairwise", [False, True])
def test_a_matrix_holds_as_many_pairs_as_its_keys_have_numbers(pairwise: bool) -> None:
    """One more than dk cannot all be held, unless keys of pairs give them more numbers."""
    _, k, v = pairs(DK + 1)
    keys = pair_product(k) if pairwise else k
    gap = keys[0, 0] @ torch.linalg.lstsq(keys[0, 0], v[0, 0]).solution - v[0, 0]
    assert (float(gap.abs().max()) < 1e-10) is pairwise
