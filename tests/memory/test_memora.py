"""Memora and Muon, whose tokens have weights of their own, token by token with autograd's gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memlm.memory import MemoraConfig, OmegaConfig
from memlm.memory.base import Dims
from memlm.memory.memora import Memora
from memlm.memory.parts.memory_rules import GATED, Rule, Softmax
from memlm.modeling import MemLMForCausalLM
from tests.cases import SEGMENT, base_model
from tests.memory.test_deep_memory import (
    LIMIT,
    B,
    Case,
    H,
    case_of,
    fast,
    gated,
    mlp,
    oracle,
    real_only,
    same,
    silu,
    weighted,
)
from tests.memory.test_omega import ends, gated_case

MASS = 1.5
MEMORA = Softmax(MASS)
Hidden = Callable[[Tensor], Tensor]


def shares(logits: Tensor) -> Tensor:
    """Above zero, and over the inputs of each output as many as these times the mass."""
    made = logits.exp()
    return MASS * logits.shape[-2] * made / made.sum(dim=-2, keepdim=True)


def memora(
    case: Case, *, chunk: int, limit: float | None, mask: Tensor | None, hidden: Hidden
) -> tuple[Tensor, list[Tensor]]:
    """Outputs and W, kept as it is printed: c softmax((1 - alpha) log W - theta grad)."""
    weights, outputs = [shares(w) for w in case.weights], []
    for t in range(case.rate.shape[2]):
        if t % chunk == 0:
            start = weights
        error = mlp(case.k[:, :, t : t + 1], start, hidden) - case.v[:, :, t : t + 1]
        grads = torch.autograd.grad(error.square().sum(), start, create_graph=True)
        norm = torch.stack([g.square().sum(dim=(2, 3)) for g in grads]).sum(dim=0).sqrt()
        factor = torch.ones_like(norm) if limit is None else (limit / norm).clamp(max=1)
        step = (factor * case.rate[:, :, t])[..., None, None]
        keep = case.log_keep[:, :, t, None, None].exp()
        new = [shares(keep * w.log() - step * g) for w, g in zip(weights, grads, strict=True)]
        real = torch.ones(B, dtype=torch.bool) if mask is None else mask[:, t]
        real = real[:, None, None, None]
        weights = [torch.where(real, a, b) for a, b in zip(new, weights, strict=True)]
        outputs.append(mlp(case.q[:, :, t : t + 1], weights, hidden))
    return torch.cat(outputs, dim=2), weights


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize(
    ("hidden", "depth", "chunk"), [(silu, 1, 1), (silu, 2, 1), (silu, 2, 4), (gated, 3, 16)]
)
def test_shares_are_exact_at_every_token(hidden, depth, chunk, limit: float | None) -> None:
    case = gated_case(depth) if hidden is gated else case_of(depth)
    # Without a limit three layers of sums of positive numbers would overflow what is written here.
    rate = (1e-5 if limit is None else 0.2) * case.rate
    case = case._replace(log_momentum=None, momentum=(), rate=rate)
    leaves = [x.requires_grad_() for x in (*case[:4], case.rate, *case.weights)]
    mask = ends()
    mask[1, 2] = False
    y, expected = memora(case, chunk=chunk, limit=limit, mask=mask, hidden=hidden)
    rule = Rule(GATED if hidden is gated else Rule().activation, retention=MEMORA)
    units = [torch.ones(B, H, dtype=torch.float64)] * depth
    options = {"chunk": chunk, "limit": limit, "mask": mask, "rule": rule, "units": units}
    told, *held = fast(case, **options)
    ours = real_only([told, *(shares(w) for w in held)], mask)
    wanted = real_only([y, *expected], mask)
    same(ours, wanted, 1e-10)
    same(*(torch.autograd.grad(weighted(x), leaves) for x in (ours, wanted)), 1e-9, 1e-9)
    with torch.no_grad():
        plain = fast(case, **options)
    same(real_only(plain, mask), real_only([told, *held], mask), 1e-12)
    for w in (shares(h) for h in held):
        assert (w > 0).all()
        torch.testing.assert_close(w.sum(-2), torch.full_like(w[:, :, 0], MASS * w.shape[-2]))


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps on the singular values; the singular vectors stay."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.square().sum(dim=-1, keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ (s.unsqueeze(-1) * vh)


def atlas(case: Case, *, chunk: int, mask: Tensor, window: int, hidden: Hidden) -> list[Tensor]:
    """S = eta S - window gradient, M = (1 - alpha) M + theta NS(S); and what is read."""
    memory = [w.detach().requires_grad_() for w in case.weights]
    momentum, outputs = list(case.momentum), []
    for t in range(case.rate.shape[2]):
        if t % chunk == 0:
            start = memory
        step = [torch.zeros_like(w) for w in memory]
        for i in range(max(0, t - window + 1), t + 1):
            error = mlp(case.k[:, :, i : i + 1], start, hidden) - case.v[:, :, i : i + 1]
            grads = torch.autograd.grad(error.square().sum(), start)
            share = case.rate[:, :, i, None, None] / window
            step = [s + share * g for s, g in zip(step, grads, strict=True)]
        eta, keep, rate = (
            x[:, :, t, None, None]
            for x in (case.log_momentum.exp(), case.log_keep.exp(), case.rate)
        )
        real = mask[:, t, None, None, None]
        new = [eta * s - g for s, g in zip(momentum, step, strict=True)]
        momentum = [torch.where(real, a, b) for a, b in zip(new, momentum, strict=True)]
        new = [keep * w + rate * newton_schulz(s) for w, s in zip(memory, momentum, strict=True)]
        memory = [torch.where(real, a, b) for a, b in zip(new, memory, strict=True)]
        outputs.append(mlp(case.q[:, :, t : t + 1], memory, hidden))
    return [torch.cat(outputs, dim=2), *memory, *momentum]


@pytest.mark.parametrize(("window", "chunk"), [(1, 1), (1, 4), (3, 4)])
def test_muon_makes_each_token_s_momentum_orthogonal(window: int, chunk: int) -> None:
    case, mask = gated_case(2, 9), ends()[:, :9]
    expected = atlas(case, chunk=chunk, mask=mask, window=window, hidden=gated)
    rule = Rule(GATED, window=window, muon=True)
    ours = fast(case, chunk=chunk, limit=None, mask=mask, rule=rule)
    same(real_only(ours, mask), real_only(expected, mask), 1e-9, 1e-9)


def test_the_same_rule_by_both_kernels() -> None:
    """Titans' rule, gradients included, with weights made for every token."""

    class Made(Rule):
        linear = False

    case, mask = case_of().needing_grad(), ends()
    options = {"chunk": 4, "limit": LIMIT, "mask": mask}
    expected = real_only(oracle(case, **options)[0], mask)
    ours = real_only(fast(case, **options, rule=Made()), mask)
    same(ours, expected, 1e-10)
    leaves = case.leaves()
    same(*(torch.autograd.grad(weighted(x), leaves) for x in (ours, expected)), 1e-9, 1e-9)


def test_a_chunk_is_shorter_where_it_is_left_open() -> None:
    for length, expected in ((8, 8), (512, 16)):
        dims = Dims(12, 12, 1, 2, 2, 6, length)
        assert Memora.resolve(MemoraConfig(), dims).chunk_length == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MemoraConfig(retention="decay"), "retention='decay' is not the rule of MemoraConfig"),
        (MemoraConfig(mass=0.0), "mass=0.0 must be above 0"),
        (OmegaConfig(muon=True), "muon=True is read with momentum=True alone"),
    ],
)
def test_rules_that_cannot_be_are_refused(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("llama"), memory=config, segment_length=SEGMENT)
