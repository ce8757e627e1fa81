"""The chunked Titans memory against its rule, token by token, gradients included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.memory.parts.deep_memory import read, read_write
from memlm.memory.parts.memory_rules import TITANS, Rule

B, H, D, OUT, T = 2, 2, 5, 4, 19
LIMIT = 4.0
WIDTHS = {1: (D, OUT), 2: (D, 7, OUT), 3: (D, 6, 7, OUT)}


class Case(NamedTuple):
    """Arguments of `read_write`, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_keep: Tensor
    log_momentum: Tensor
    rate: Tensor
    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...]

    def leaves(self) -> list[Tensor]:
        return [*self[:6], *self.weights, *self.momentum]

    def needing_grad(self) -> Case:
        return self.of([x.detach().clone().requires_grad_() for x in self.leaves()])

    def to(self, dtype: torch.dtype) -> Case:
        return self.of([x.to(dtype) for x in self.leaves()])

    def tokens(self, *where: int | None) -> Case:
        return self._replace(**{name: getattr(self, name)[:, :, slice(*where)] for name in TOKENS})

    def row(self, i: int) -> Case:
        return self.of([x[i : i + 1] for x in self.leaves()])

    def of(self, leaves: Sequence[Tensor]) -> Case:
        depth = len(self.weights)
        return Case(*leaves[:6], tuple(leaves[6 : 6 + depth]), tuple(leaves[6 + depth :]))


TOKENS = Case._fields[:6]


def case_of(
    depth: int = 2,
    length: int = T,
    rows: int = B,
    heads: int = H,
    widths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Case:
    widths = widths or WIDTHS[depth]

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, heads, *shape, dtype=dtype)

    weights = tuple(normal(n, m) for n, m in pairwise(widths))
    return Case(
        F.normalize(normal(length, widths[0]), dim=-1),
        F.normalize(normal(length, widths[0]), dim=-1) * (0.5 + normal(length, 1).sigmoid()),
        normal(length, widths[-1]),
        F.logsigmoid(normal(length) + 2),
        F.logsigmoid(normal(length) + 1),
        0.2 * normal(length).sigmoid(),
        weights,
        tuple(0.1 * torch.randn_like(w) for w in weights),
    )


def holes(length: int = T, rows: int = B) -> Tensor:
    mask = torch.rand(rows, length) > 0.3
    mask[0, -2:] = False  # a last chunk that ends masked
    return mask


def silu(z: Tensor) -> Tensor:
    return z * torch.sigmoid(z) * (2 / z.shape[-1]) ** 0.5


def gated(z: Tensor) -> Tensor:
    """Hidden features that are opened by others."""
    a, b = z[..., : z.shape[-1] // 2], z[..., z.shape[-1] // 2 :]
    return a * torch.sigmoid(a) * b * (2 / b.shape[-1]) ** 0.5


def mlp(x: Tensor, weights: Sequence[Tensor], hidden: Callable[[Tensor], Tensor] = silu) -> Tensor:
    for w in weights[:-1]:
        x = hidden(x @ w)
    return x @ weights[-1]


def square(error: Tensor, t: int) -> Tensor:
    """What errors (B, H, 1, m) at token t cost together."""
    return error.square().sum()


def oracle(
    case: Case,
    *,
    chunk: int,
    limit: float | None,
    mask: Tensor | None = None,
    cost: Callable[[Tensor, int], Tensor] = square,
    window: int = 1,
    hidden: Callable[[Tensor], Tensor] = silu,
    scale: Callable[[Tensor, int], Tensor | float] = lambda held, layer: 1.0,
) -> tuple[list[Tensor], Tensor]:
    """The rule, one token at a time; also the norms of the gradients, (T, B, H)."""
    graph = any(x.requires_grad for x in case.leaves())
    if not graph:
        case = case._replace(weights=tuple(w.clone().requires_grad_() for w in case.weights))
    memory, momentum = list(case.weights), list(case.momentum)
    outputs, norms = [], []
    for t in range(case.rate.shape[2]):
        if t % chunk == 0:
            scales = [scale(w, layer) for layer, w in enumerate(memory)]
            start = [w * s for w, s in zip(memory, scales, strict=True)]
            start = [w if graph else w.detach().requires_grad_() for w in start]
        step = [torch.zeros_like(w) for w in memory]
        for i in range(max(0, t - window + 1), t + 1):
            error = mlp(case.k[:, :, i : i + 1], start, hidden) - case.v[:, :, i : i + 1]
            grads = torch.autograd.grad(cost(error, i), start, create_graph=graph)
            norm = torch.stack([g.square().sum(dim=(2, 3)) for g in grads]).sum(dim=0).sqrt()
            factor = torch.ones_like(norm) if limit is None else (limit / norm).clamp(max=1)
            share = (factor * case.rate[:, :, i] / window)[..., None, None]
            step = [s + share * g for s, g in zip(step, grads, strict=True)]
        real = torch.ones(case.rate.shape[0]) if mask is None else mask[:, t]
        real = real.bool()[:, None, None, None]
        eta, keep = (x[:, :, t, None, None] for x in (case.log_momentum.exp(), case.log_keep.exp()))
        for i, s in enumerate(step):
            new = eta * momentum[i] - s
            memory[i] = torch.where(real, keep * memory[i] + new, memory[i])
            momentum[i] = torch.where(real, new, momentum[i])
        made = [w * s for w, s in zip(memory, scales, strict=True)]
        outputs.append(mlp(case.q[:, :, t : t + 1], made, hidden))
        norms.append(norm.detach())
    return [torch.cat(outputs, dim=2), *memory, *momentum], torch.stack(norms)


def fast(
    case: Case,
    *,
    chunk: int,
    limit: float | None,
    mask: Tensor | None = None,
    rule: Rule = TITANS,
    bound: Tensor | None = None,
    recent: Sequence[Tensor] = (),
    units: Sequence[Tensor] = (),
) -> list[Tensor]:
    if rule.window > 1 and not recent:
        written = [x for x in (case.k, case.v, case.rate, bound) if x is not None]
        recent = [x.new_zeros(*x.shape[:2], rule.window - 1, *x.shape[3:]) for x in written]
    y, weights, momentum = read_write(
        *case,
        chunk=chunk,
        limit=limit,
        mask=mask,
        rule=rule,
        bound=bound,
        recent=recent,
        units=units,
    )
    return [y, *weights, *momentum]


def real_only(results: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Outputs at masked tokens set to zero: they may be anything finite."""
    y, *state = results
    assert y.isfinite().all()
    return [y if mask is None else y * mask[:, None, :, None], *state]


def same(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float, relative: float = 0.0) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=relative)


def weighted(results: Sequence[Tensor]) -> Tensor:
    """A sum in which every number counts differently."""
    return sum((x * torch.linspace(-1, 1.5, x.numel()).view(x.shape)).sum() for x in results)


def gradients(results: Sequence[Tensor], case: Case) -> tuple[Tensor, ...]:
    return torch.autograd.grad(weighted(results), case.leaves())


@pytest.mark.parametrize("holed", [False, True])
@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_rule(depth: int, chunk: int, limit: float | None, holed: bool) -> None:
    case, mask = case_of(depth), holes() if holed else None
    expected, norms = oracle(case, chunk=chunk, limit=limit, mask=mask)
    assert (norms > LIMIT).any() and (norms < LIMIT).any()
    expected = real_only(expected, mask)
    for ours in (case, case.needing_grad()):  # two ways through the code
        same(real_only(fast(ours, chunk=chunk, limit=limit, mask=mask), mask), expected, 1e-10)


@pytest.mark.parametrize("holed", [False, True])
@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gradients(depth: int, chunk: int, limit: float | None, holed: bool) -> None:
    case, mask = case_of(depth).needing_grad(), holes() if holed else None
    expected = gradients(
        real_only(oracle(case, chunk=chunk, limit=limit, mask=mask)[0], mask), case
    )
    ours = gradients(real_only(fast(case, chunk=chunk, limit=limit, mask=mask), mask), case)
    assert all(g.abs().max() > 1e-3 for g in expected)
    same(ours, expected, 1e-9, 1e-9)


# `test_gradients` compares with the rule's own gradients, limit or none; this one needs no rule.
@pytest.mark.parametrize(
    ("depth", "limit"),
    [
        pytest.param(depth, limit, marks=() if limit == 0.3 else pytest.mark.slow)
        for depth in (1, 2)
        for limit in (None, 0.3, 1.5, 1e3)
    ],
)
def test_gradcheck(depth: int, limit: float | None) -> None:
    widths = (2, 2) if depth == 1 else (2, 3, 2)
    case = case_of(length=5, rows=1, widths=widths).needing_grad()
    mask = torch.tensor([[True, True, False, True, True]])

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(real_only(fast(case.of(leaves), chunk=2, limit=limit, mask=mask), mask))

    assert torch.autograd.gradcheck(run, case.leaves())


def test_read_is_the_mlp() -> None:
    for depth in WIDTHS:
        case = case_of(depth).needing_grad()
        same([read(case.q, case.weights)], [mlp(case.q, case.weights)], 1e-12)
        grads = [
            torch.autograd.grad(weighted([f(case.q, case.weights)]), [case.q, *case.weights])
            for f in (read, mlp)
        ]
        same(*grads, 1e-12)


@pytest.mark.parametrize("cut", [4, 8, 16])
def test_cuts_at_chunks_change_nothing(cut: int) -> None:
    case, mask = case_of().needing_grad(), holes()
    whole = real_only(fast(case, chunk=4, limit=LIMIT, mask=mask), mask)
    first, *state = fast(case.tokens(None, cut), chunk=4, limit=LIMIT, mask=mask[:, :cut])
    rest = case.tokens(cut, None)._replace(weights=tuple(state[:2]), momentum=tuple(state[2:]))
    second, *state = fast(rest, chunk=4, limit=LIMIT, mask=mask[:, cut:])
    pieces = real_only([torch.cat([first, second], dim=2), *state], mask)
    same(pieces, whole, 1e-12)
    same(gradients(pieces, case), gradients(whole, case), 1e-10, 1e-10)


def test_a_row_is_what_it_is_alone() -> None:
    case, mask = case_of(), holes()
    together = fast(case, chunk=4, limit=LIMIT, mask=mask)
    for i in range(B):
        alone = fast(case.row(i), chunk=4, limit=LIMIT, mask=mask[i : i + 1])
        same([x[i : i + 1] for x in together], alone, 1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_masked_tokens_write_nothing(chunk: int) -> None:
    case, mask = case_of().needing_grad(), holes()
    other = case_of(length=T).of(case_of().leaves())
    blank = ~mask[:, None, :]
    changed = case._replace(
        **{
            name: torch.where(
                blank if getattr(case, name).ndim == 3 else blank[..., None],
                getattr(other, name),
                getattr(case, name),
            )
            for name in TOKENS
        }
    )
    before, after = (
        real_only(fast(c, chunk=chunk, limit=LIMIT, mask=mask), mask) for c in (case, changed)
    )
    same(before, after, 0.0)
    for grad in gradients(before, case)[:6]:
        shape = blank if grad.ndim == 3 else blank[..., None]
        assert not grad.masked_select(shape).any()


def test_a_row_of_padding_keeps_its_state() -> None:
    case = case_of().needing_grad()
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1] = False
    results = fast(case, chunk=4, limit=LIMIT, mask=mask)
    for new, old in zip(results[1:], [*case.weights, *case.momentum], strict=True):
        assert torch.equal(new[1], old[1])
        assert not torch.equal(new[0], old[0])
    assert all(g.isfinite().all() for g in gradients(results, case))


@pytest.mark.parametrize("chunk", [1, 64])
def test_one_token(chunk: int) -> None:
    case = case_of(length=1).needing_grad()
    expected, _ = oracle(case, chunk=chunk, limit=LIMIT)
    ours = fast(case, chunk=chunk, limit=LIMIT)
    same(ours, expected, 1e-12)
    same(gradients(ours, case), gradients(expected, case), 1e-10, 1e-10)


def test_nothing_to_learn_has_a_finite_gradient() -> None:
    """A key answered exactly: the norm that clips is zero."""
    case = case_of()
    case = case._replace(
        v=torch.zeros_like(case.v), weights=tuple(torch.zeros_like(w) for w in case.weights)
    ).needing_grad()
    results = fast(case, chunk=4, limit=LIMIT)
    assert all(x.isfinite().all() for x in (*results, *gradients(results, case)))


def test_without_decay_or_momentum_it_is_the_delta_rule() -> None:
    case = case_of(depth=1)
    case = case._replace(
        log_keep=torch.zeros_like(case.rate), log_momentum=torch.full_like(case.rate, -torch.inf)
    )
    w, expected = case.weights[0], []
    for t in range(T):
        k, v, beta = case.k[:, :, t], case.v[:, :, t], 2 * case.rate[:, :, t]
        missing = v - torch.einsum("bhn,bhnm->bhm", k, w)
        w = w + torch.einsum("bh,bhn,bhm->bhnm", beta, k, missing)
        expected.append(torch.einsum("bhn,bhnm->bhm", case.q[:, :, t], w))
    y, memory, _ = fast(case, chunk=1, limit=None)
    same([y, memory], [torch.stack(expected, dim=2), w], 1e-12)


@pytest.mark.parametrize("chunk", [1, 4])
def test_no_momentum_is_momentum_that_is_forgotten_at_once(chunk: int) -> None:
    case, mask = case_of().needing_grad(), holes()
    none = [torch.zeros_like(s) for s in case.momentum]
    shut = case._replace(log_momentum=torch.full_like(case.rate, -torch.inf), momentum=tuple(none))
    expected = real_only(oracle(shut, chunk=chunk, limit=LIMIT, mask=mask)[0], mask)[:3]
    without = case._replace(log_momentum=None, momentum=())
    ours = real_only(fast(without, chunk=chunk, limit=LIMIT, mask=mask), mask)
    same(ours, expected, 1e-12)
    leaves = [*case[:4], case.rate, *case.weights]
    same(*(torch.autograd.grad(weighted(x), leaves) for x in (ours, expected)), 1e-10, 1e-10)


def test_what_was_written_changes_the_next_loss() -> None:
    """Gradients are taken at the chunk's start, not at weights that never change."""
    case = case_of(length=8)
    other = case._replace(v=torch.cat([case.v[:, :, :4] + 1, case.v[:, :, 4:]], dim=2))
    states = [fast(c.tokens(None, 4), chunk=4, limit=LIMIT)[1:3] for c in (case, other)]
    k, v = case.k[:, :, 4:], case.v[:, :, 4:]
    losses = [(read(k, w) - v).square().sum(dim=-1) for w in states]
    assert (losses[0] - losses[1]).abs().min() > 1e-4
    # And so what the second chunk writes is another thing, beyond what is carried over.
    shared = {"momentum": tuple(torch.zeros_like(s) for s in case.momentum)}
    written = []
    for weights in states:
        start = case.tokens(4, None)._replace(weights=tuple(weights), **shared)
        written.append(fast(start, chunk=4, limit=LIMIT)[3])
    assert (written[0] - written[1]).abs().max() > 1e-3


def test_learning_lowers_the_loss() -> None:
    case = case_of(length=64)
    case = case._replace(
        k=case.k[:, :, :4].repeat(1, 1, 16, 1),
        v=case.v[:, :, :4].repeat(1, 1, 16, 1),
        log_keep=torch.zeros_like(case.rate),
        rate=torch.full_like(case.rate, 0.05),
    )
    weights = fast(case, chunk=4, limit=None)[1:3]
    before, after = (
        (read(case.k, w) - case.v).square().sum(dim=-1).mean() for w in (case.weights, weights)
    )
    assert after < 0.2 * before


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bounded_whatever_the_rates(depth: int) -> None:
    """One key over and over at rate 1, where an unclipped memory overflows within a few chunks."""
    case = case_of(depth, length=4096, rows=1, heads=1, dtype=torch.float32)
    case = case._replace(
        k=case.k[:, :, :1].expand_as(case.k),
        log_keep=torch.full_like(case.rate, 0.99).log(),
        log_momentum=torch.full_like(case.rate, 0.9).log(),
        rate=torch.ones_like(case.rate),
    ).needing_grad()
    results = fast(case, chunk=64, limit=1.0)
    grads = gradients(results, case)
    assert all(x.isfinite().all() for x in (*results, *grads))
    # |S| <= rate * limit / (1 - eta), |M| <= |S| / alpha
    _, *state = results
    assert all(w.norm() <= 1000 + 1e-2 for w in state[:depth])
    assert all(s.norm() <= 10 + 1e-4 for s in state[depth:])
    free = fast(case, chunk=64, limit=None)
    assert not all(x.isfinite().all() for x in free)


def test_float32_is_close() -> None:
    wide = case_of(length=200).needing_grad()
    narrow = wide.to(torch.float32).needing_grad()
    expected, ours = (fast(c, chunk=16, limit=LIMIT) for c in (wide, narrow))
    assert all(x.dtype == torch.float32 for x in ours)
    same([x.double() for x in ours], expected, 1e-5, 1e-4)
    grads = [x.double() for x in gradients(ours, narrow)]
    for a, b in zip(grads, gradients(expected, wide), strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log", [-80.0, -torch.inf])
def test_gates_that_shut(log: float, dtype: torch.dtype) -> None:
    case = case_of(dtype=dtype)
    shut = torch.rand(2, B, H, T) < 0.5
    case = case._replace(
        log_keep=case.log_keep.masked_fill(shut[0], log),
        log_momentum=case.log_momentum.masked_fill(shut[1], log),
    ).needing_grad()
    results = fast(case, chunk=8, limit=LIMIT)
    same(
        [x.double() for x in results],
        oracle(case.to(torch.float64), chunk=8, limit=LIMIT)[0],
        1e-10 if dtype == torch.float64 else 1e-4,
    )
    assert all(g.isfinite().all() for g in gradients(results, case))


def test_autocast_and_narrow_inputs_do_not_narrow_the_memory() -> None:
    case = case_of(dtype=torch.float32).needing_grad()
    plain = fast(case, chunk=4, limit=LIMIT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fast(case, chunk=4, limit=LIMIT)
        assert read(case.q, case.weights).dtype == torch.float32
        # Those of the gates go through ordinary autograd, which autocast narrows here.
        grads = gradients(cast, case)
    same(cast, plain, 0.0)
    expected = gradients(plain, case)
    same(grads[:3] + grads[6:], expected[:3] + expected[6:], 0.0)
    same(grads[3:6], expected[3:6], 0.1, 0.1)
    half = case._replace(q=case.q.bfloat16(), k=case.k.bfloat16(), v=case.v.bfloat16())
    assert all(x.dtype == torch.float32 for x in fast(half, chunk=4, limit=LIMIT))


def test_a_state_shared_by_all_rows() -> None:
    """The first state is one parameter, expanded; its gradient is the sum over rows."""
    case, mask = case_of(), holes()
    start = [w[:1].clone().requires_grad_() for w in (*case.weights, *case.momentum)]
    grads = []
    for spread in ([x.expand(B, -1, -1, -1) for x in start], [x.repeat(B, 1, 1, 1) for x in start]):
        results = fast(
            case._replace(weights=tuple(spread[:2]), momentum=tuple(spread[2:])),
            chunk=4,
            limit=LIMIT,
            mask=mask,
        )
        grads.append(torch.autograd.grad(weighted(results), start))
    same(*grads, 1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_state_is_its_own(rows: int) -> None:
    """No storage shared or larger than the tensor: it can be saved, and a chunk is not kept alive."""
    for grad in (False, True):
        case = case_of(rows=rows, heads=1)
        state = fast(case.needing_grad() if grad else case, chunk=4, limit=LIMIT)[1:]
        assert len({x.untyped_storage().data_ptr() for x in state}) == len(state)
        for x in state:
            assert x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
