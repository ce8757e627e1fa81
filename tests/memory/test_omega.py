"""Omega against sums of autograd's gradients over a window, token by token; its features, its gates."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.memory import OmegaConfig, TitansMAGConfig
from memlm.memory.base import Dims
from memlm.memory.parts.deep_memory import read
from memlm.memory.parts.feature_maps import quadratic
from memlm.memory.parts.memory_rules import GATED, Huber, Rule
from memlm.modeling import MemLMForCausalLM
from tests.cases import SEGMENT, base_model, memory_model, tokens
from tests.memory.test_deep_memory import (
    LIMIT,
    B,
    Case,
    T,
    case_of,
    fast,
    gated,
    gradients,
    mlp,
    oracle,
    real_only,
    same,
    silu,
    weighted,
)

HIDDEN = {silu: Rule().activation, gated: GATED}


def gated_case(depth: int, length: int = T) -> Case:
    """Every hidden layer twice as wide as what leaves it."""
    case = case_of(depth, length)
    widths = {1: (5, 4), 2: (5, 3, 4), 3: (5, 3, 2, 4)}[depth]
    weights = [
        torch.randn(*case.rate.shape[:2], n, m if m == 4 else 2 * m, dtype=torch.float64)
        for n, m in pairwise(widths)
    ]
    return case._replace(
        weights=tuple(weights), momentum=tuple(0.1 * torch.randn_like(w) for w in weights)
    )


def ends(rows: int = B) -> Tensor:
    """Masked tokens stand last: one row whole, the others shorter."""
    count = torch.tensor([T, 6, *torch.randint(1, T, (rows - 2,))])
    return torch.arange(T) < count[:, None]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("hidden", "depth", "window", "chunk"),
    [
        (gated, 2, 1, 4),
        (gated, 3, 1, 3),
        (silu, 1, 2, 1),
        (silu, 2, 3, 4),
        (gated, 2, 4, 4),
        (gated, 2, 7, 3),
        (gated, 3, 3, 16),
    ],
)
def test_values_and_gradients(hidden, depth: int, window: int, chunk: int, masked: bool) -> None:
    case = (gated_case(depth) if hidden is gated else case_of(depth)).needing_grad()
    mask = ends() if masked else None
    rule = Rule(activation=HIDDEN[hidden], window=window)
    options = {"chunk": chunk, "limit": LIMIT, "mask": mask}
    expected, norms = oracle(case, **options, window=window, hidden=hidden)
    assert (norms > LIMIT).any() and (norms < LIMIT).any()
    ours = fast(case, **options, rule=rule)
    expected, ours = real_only(expected, mask), real_only(ours, mask)
    same(ours, expected, 1e-10)
    same(gradients(ours, case), gradients(expected, case), 1e-9, 1e-9)
    with torch.no_grad():
        same(real_only(fast(case, **options, rule=rule), mask), ours, 1e-13)


def test_a_window_under_huber_s_loss_without_momentum() -> None:
    """All of a rule at once; bounds come along with the tokens they belong to."""
    case = gated_case(2).needing_grad()
    bound = (2 * torch.rand(case.rate.shape, dtype=torch.float64) + 0.5).requires_grad_()

    def cost(error: Tensor, t: int) -> Tensor:
        size, edge = error.norm(dim=-1), bound[:, :, t : t + 1]
        return torch.where(size <= edge, size**2, 2 * edge * size - edge**2).sum()

    shut = case._replace(
        log_momentum=torch.full_like(case.rate, -torch.inf),
        momentum=tuple(torch.zeros_like(s) for s in case.momentum),
    )
    expected, _ = oracle(shut, chunk=4, limit=None, cost=cost, window=3, hidden=gated)
    rule = Rule(activation=GATED, objective=Huber(), window=3)
    without = case._replace(log_momentum=None, momentum=())
    ours = fast(without, chunk=4, limit=None, rule=rule, bound=bound)
    same(ours, expected[:3], 1e-10)
    leaves = [*case[:4], case.rate, bound, *case.weights]
    found, wanted = (torch.autograd.grad(weighted(x), leaves) for x in (ours, expected[:3]))
    same(found, wanted, 1e-9, 1e-9)


@pytest.mark.parametrize("cut", [4, 12])
def test_cuts_at_chunks_change_nothing(cut: int) -> None:
    """A window reaches back over the cut, to what was handed on."""
    case, rule = gated_case(2).needing_grad(), Rule(activation=GATED, window=6)
    whole = fast(case, chunk=4, limit=LIMIT, rule=rule)
    first, *state = fast(case.tokens(None, cut), chunk=4, limit=LIMIT, rule=rule)
    rest = case.tokens(cut, None)._replace(weights=tuple(state[:2]), momentum=tuple(state[2:]))
    written = [case.k, case.v, case.rate]
    recent = [F.pad(x.movedim(2, -1), (5, 0)).movedim(-1, 2)[:, :, cut : cut + 5] for x in written]
    second, *state = fast(rest, chunk=4, limit=LIMIT, rule=rule, recent=recent)
    pieces = [torch.cat([first, second], dim=2), *state]
    same(pieces, whole, 1e-12)
    same(gradients(pieces, case), gradients(whole, case), 1e-10, 1e-10)


def test_read_is_the_gated_mlp() -> None:
    case = gated_case(3)
    same(
        [read(case.q, case.weights, Rule(activation=GATED))],
        [mlp(case.q, case.weights, gated)],
        1e-12,
    )


def test_features_make_a_polynomial_of_the_product() -> None:
    x, y = F.normalize(torch.randn(2, 3, 2, 7, 6, dtype=torch.float64), dim=-1)
    shares = torch.tensor([[3.0, 4.0], [1.0, -1.0]], dtype=torch.float64).unsqueeze(1)
    a, b = quadratic(x, shares), quadratic(y, shares)
    assert a.shape == (3, 2, 7, 6 + 21)
    product = (x * y).sum(-1)
    part = torch.tensor([0.36, 0.5], dtype=torch.float64)[:, None]
    same([(a * b).sum(-1)], [part * product + (1 - part) * product**2], 1e-14)
    same([a.norm(dim=-1)], [torch.ones_like(product)], 1e-14)


def test_heads_are_small_where_they_are_left_open() -> None:
    """Sixteen numbers at most, as many heads as it takes to be as wide as the base."""
    for heads, head, expected in (
        (2, 64, (8, 16)),
        (3, 10, (3, 10)),
        (2, 40, (8, 10)),
        (1, 17, (17, 1)),
    ):
        dims = Dims(heads * head, heads * head, 1, heads, heads, head, 32)
        filled = OmegaConfig().resolved(dims)
        assert (filled.num_heads, filled.head_dim) == expected
    filled = OmegaConfig(num_heads=2).resolved(Dims(128, 128, 1, 4, 4, 32, 32))
    assert (filled.num_heads, filled.head_dim) == (2, 64)


@torch.no_grad()
def test_a_window_of_one_on_a_plain_mlp_is_titans_mag() -> None:
    """The whole model, under another name, with the very parameters."""
    ids = tokens(2, 3 * SEGMENT + 1)
    sizes = {"num_heads": 2, "chunk_length": 4, "conv_size": 3, "write_gate": "sigmoid"}
    plain = {"key_features": "linear", "gated": False, "momentum": True}
    titans = memory_model("llama", TitansMAGConfig(**sizes))
    omega = memory_model("llama", OmegaConfig(**sizes, **plain, window=1))
    names = {n.replace("omega", "titans-mag"): p for n, p in omega.named_parameters()}
    assert all(torch.equal(p, names[n]) for n, p in titans.named_parameters())
    expected = titans(ids).logits
    assert torch.equal(omega(ids).logits, expected)
    wider = memory_model("llama", OmegaConfig(**sizes, **plain, window=2))
    assert (wider(ids).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_a_window_reaches_into_the_segment_before() -> None:
    """Of two states that differ in the last tokens alone, the next segment makes different weights."""
    model = memory_model("llama", OmegaConfig(num_heads=2, chunk_length=3, window=3))
    ids = tokens(2, 2 * SEGMENT)
    state = model(ids[:, :SEGMENT]).memory_state
    name = next(n for n in state.tensors if n.endswith("recent.1"))
    other = state.fork()
    other.tensors[name].add_(1.0)
    after, changed = (model(ids[:, SEGMENT:], memory_state=s).memory_state for s in (state, other))
    weights = [n for n in after.tensors if n.startswith(name.split("recent")[0] + "weights")]
    assert weights
    assert all((after[n] - changed[n]).abs().max() > 1e-6 for n in weights)


@torch.no_grad()
def test_what_a_segment_was_not_to_write_no_later_window_writes() -> None:
    """Handed-on rates are multiplied by the segment's gate, those that are older by their own's alone."""
    sizes = {"num_heads": 2, "chunk_length": 3, "window": 5}
    plain = memory_model("llama", OmegaConfig(**sizes))
    model = memory_model("llama", OmegaConfig(**sizes, write_gate="sigmoid"))
    model.load_state_dict(plain.state_dict(), strict=False)
    model.config.segment_length = plain.config.segment_length = 2
    ids = tokens(2, 2)
    before = model(tokens(2, 4, seed=5)).memory_state
    after = model(ids, memory_state=before).memory_state
    name = next(n for n in after.tensors if n.endswith("recent.2"))
    model.set_memory_options(write_threshold=float("inf"))
    silent = model(ids, memory_state=before).memory_state
    # Of four rates the two older ones are as they were, the two new ones not to be written.
    assert torch.equal(silent[name][..., :2], before[name][..., 2:])
    assert torch.equal(after[name][..., :2], before[name][..., 2:])
    assert (silent[name][..., 2:] == 0).all() and (after[name][..., 2:] > 0).all()
    # In the first layer both models read the same; its gates then are what is between them.
    state = plain(ids).memory_state
    gated = model.init_state(2)
    model.set_memory_options(write_threshold=0.0)
    opened = model(ids, memory_state=gated).memory_state
    share = (opened[name] / state[name])[..., 2:]
    torch.testing.assert_close(share[..., 0], share[..., 1])
    mean = opened[name.replace("recent.2", "written")]
    torch.testing.assert_close(share[..., 0].mean(dim=1), mean)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (OmegaConfig(window=0), "window=0 must be at least 1"),
        (OmegaConfig(depth=1), "gated=True needs a hidden layer, but depth=1"),
        (
            OmegaConfig(key_features="cubic"),
            "key_features='cubic' is unknown; use 'linear' or 'quad",
        ),
    ],
)
def test_rules_that_cannot_be_are_refused(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemLMForCausalLM.from_base(base_model("llama"), memory=config, segment_length=SEGMENT)
